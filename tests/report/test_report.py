"""What a run's page, JSON and picture say, of whole runs and of broken ones."""

import dataclasses
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.report.synthetic import RECIPE, TASKS, write_evaluation, write_json, write_run
from vlafit import report
from vlafit.errors import VlafitError
from vlafit.report.facts import Point
from vlafit.report.films import Films
from vlafit.report.page import page
from vlafit.report.picture import Arm, ablation_figure, read_scores, result_figure
from vlafit.report.plots import Curve, Mark, curves
from vlafit.score import Score, wilson


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; tests only read it."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    report.build(folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run for tests that break it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def html_of(folder: Path) -> str:
    return page(report.read_facts(folder))


def json_of(folder: Path) -> dict:
    return json.loads(json.dumps(report.read_facts(folder).to_json(), allow_nan=False))


class Strict(HTMLParser):
    """Notes what an element links to, and whether each is closed by its own name."""

    VOID = ("meta", "br", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "poster", "action")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    return parser


# ------------------------------------------------------------------------------------- a whole run


def test_the_json_holds_success_before_after_and_with_the_wrong_instruction_with_wilson_intervals(
    whole: Path,
):
    success = json.loads((whole / "report.json").read_text())["success"]
    for name, count in (("before", 1), ("after", 47), ("wrong_instruction", 1)):
        low, high = wilson(count, 50)
        one = success[name]
        assert (one["successes"], one["episodes"], one["low"], one["high"]) == (count, 50, low, high)
        assert one["errors"] == 0


def test_the_json_holds_what_the_page_shows(whole: Path):
    said = json.loads((whole / "report.json").read_text())
    assert said["verdict"] == "Success rose, and the two 95 % intervals do not overlap."
    assert said["evaluations"]["before"]["tasks"]["faucet-open-v3"]["successes"] == 1
    assert len(said["evaluations"]["after"]["episodes"]) == 50
    assert (
        said["evaluations"]["wrong_instruction"]["tasks"]["faucet-open-v3"]["instruction"]
        == (TASKS["faucet-close-v3"])
    )
    assert said["training"]["steps"] == 400
    assert said["training"]["metrics"]["validation/loss"]["lowest_step"] == 400
    assert said["tuning"]["rows"][-1]["rule"] == 0
    assert said["recipe"]["train"]["batch_size"] == 16
    assert said["run"]["versions"]["torch"] == "2.13.0"
    assert set(said["sha256"]) == {"recipe.toml", "checkpoints/step_000400/manifest.json"}
    assert {"for": "this run", "command": "vlafit train quickstart"} in said["commands"]
    assert (said["caveats"], said["missing"]) == ([], [])


def test_the_page_shows_the_result_the_tasks_the_films_the_table_the_commands_and_the_hashes(whole: Path):
    text = (whole / "report.html").read_text()
    assert (
        '<span class="before">2 %</span><span class="arrow">→</span><span class="after">94 %</span>' in text
    )
    assert "47 of 50 " in text and "95 %: 84 to 98 %" in text
    assert all(sentence in text for sentence in TASKS.values())
    assert "24/25" in text
    assert text.count("data:image/png;base64,") == text.count("data:video/mp4;base64,") == 6
    assert "expert+projections" in text
    assert "vlafit train quickstart" in text
    assert json.loads((whole / "report.json").read_text())["sha256"]["recipe.toml"] in text
    for title in ("Success while training", "Loss", "Action error", "Learning rate", "Does it follow"):
        assert title in text
    assert "Before you use these numbers" not in text and "Missing from this page" not in text


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(whole: Path):
    text = (whole / "report.html").read_text()
    parser = parsed(text)
    assert all(link.startswith(("data:", "#")) for link in parser.links)
    assert len(parser.ids) == len(set(parser.ids))
    outside_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    for foreign in ("http:", "https:", "<script", "@import", "url(data", "<link"):
        assert foreign not in outside_data


def test_curves_follow_the_colours_of_the_page(whole: Path):
    text = (whole / "report.html").read_text()
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert "var(--accent)" in svg
    assert "#0" not in svg.replace("url(#", "")


def test_the_picture_is_a_png(whole: Path):
    with Image.open(whole / "result.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300


def test_a_report_of_the_same_run_is_the_same(whole: Path):
    before = [(whole / name).read_bytes() for name in ("report.html", "report.json", "result.png")]
    report.build(whole)
    assert [(whole / name).read_bytes() for name in ("report.html", "report.json", "result.png")] == before


# ----------------------------------------------------------------------------------------- caveats


def test_errors_of_the_environment_stand_above_the_result_and_are_no_failures(run: Path):
    shutil.rmtree(run / "eval" / "after")
    write_evaluation(run, "after", (20, 23), 25, errors=3)
    text, said = html_of(run), json_of(run)
    assert "INCOMPLETE: 3 of 50 episodes" in text.split("Success by task")[0]
    assert (said["success"]["after"]["episodes"], said["success"]["after"]["errors"]) == (47, 3)
    assert "3 errors" in text


def test_a_renderer_notice_is_a_caveat(run: Path):
    path = run / "eval" / "after" / "result.json"
    values = json.loads(path.read_text())
    values["notices"] = ["RENDERER: the policy was trained on images rendered by 'ray'"]
    write_json(path, values)
    assert "Evaluation &#x27;after&#x27;: RENDERER: the policy was trained" in html_of(run)


def test_metrics_that_are_not_finite_are_left_out_of_the_curves_and_told(run: Path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 405, "time_s": 301, "train/loss": null, "train/grad_norm": NaN}\n')
        file.write('{"step": 410, "time_s": 302, "train/loss": null}\n')
    text, said = html_of(run), json_of(run)
    assert any("2 logged values of train/loss were not finite" in caveat for caveat in said["caveats"])
    assert "1 logged values of train/grad_norm were not finite" in text
    parsed(text)


def test_metrics_that_no_chart_can_hold_are_left_out_and_told(run: Path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 405, "time_s": 301, "train/loss": 1e308}\n')
        file.write('{"step": 410, "time_s": 302, "train/loss": -1e308}\n')
        file.write('{"step": 415, "time_s": 303, "train/loss": 2e38}\n')
    assert "2 logged values of train/loss" in html_of(run)


def test_a_history_that_was_emptied_is_told(run: Path):
    (run / "metrics.jsonl").write_bytes(b"")
    steps = json.loads((run / "run.json").read_text())["steps"]
    assert any(f"{steps} steps: the history is lost" in text for text in json_of(run)["missing"])
    assert "the history is lost" in html_of(run)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Score(0, 25), Score(24, 25), "Success rose"),
        (Score(24, 25), Score(0, 25), "Success fell"),
        (Score(10, 25), Score(13, 25), "overlap: these episodes do not show a difference"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals_show(before: Score, after: Score, expected: str):
    assert expected in report.facts.verdict({"before": before, "after": after})
    assert report.facts.verdict({"after": after}) == ""


def test_text_from_outside_is_escaped(tmp_path: Path):
    name = "<script>alert(1)</script>"
    recipe = dataclasses.replace(RECIPE, name=name, purpose='"><img src=x>&')
    text = html_of(write_run(tmp_path / "run", recipe))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&quot;&gt;&lt;img src=x&gt;&amp;" in text
    parsed(text)


def test_a_dollar_sign_in_a_name_begins_no_formula():
    """matplotlib reads "$...$" as TeX, and fails where it is none."""
    points = (Point(0, 0.0, 1.0), Point(1, 60.0, 0.5))
    lines = [Curve("$\\frac$ <b>", points), Curve("costs $5 to $6", points)]
    chart = curves("x", lines, "step", marks=[Mark("$\\sqrt$", points[1])])
    assert all(text in chart for text in ("$\\frac$ &lt;b&gt;", "costs $5 to $6", "$\\sqrt$"))
    arms = [Arm("$\\frac$", (Score(3, 4),))]
    assert ablation_figure(arms, title="$\\sqrt$ and $5").startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------ partial runs


def test_a_run_that_only_has_its_recipe_gives_a_page_that_says_what_is_missing(run: Path):
    for path in ("run.json", "plan.json", "metrics.jsonl", "result.png"):
        (run / path).unlink()
    for folder in ("eval", "checkpoints"):
        shutil.rmtree(run / folder)
    text, said = html_of(run), json_of(run)
    assert said["success"] == {} and said["finished"] is False
    missing = " ".join(said["missing"])
    for what in ("run.json", "plan.json", "metrics.jsonl", "'before'", "'after'", "'wrong_instruction'"):
        assert what in missing
    report.build(run)
    assert not (run / "result.png").exists()
    assert "Missing from this page" in text
    parsed(text)


def test_an_unfinished_run_says_how_to_go_on(run: Path):
    values = json.loads((run / "run.json").read_text())
    del values["finished"]
    write_json(run / "run.json", values)
    shutil.rmtree(run / "eval" / "after")
    shutil.rmtree(run / "eval" / "wrong_instruction")
    text = html_of(run)
    assert f"vlafit train {run}/recipe.toml --out {run} --resume" in text
    assert "The run has not finished" in text
    assert "success, before" in text


def test_commands_can_be_pasted_whatever_the_folders_name_and_the_launcher(run: Path, tmp_path: Path):
    folder = tmp_path / "my runs" / "it's one"
    shutil.copytree(run, folder)
    values = json.loads((folder / "run.json").read_text())
    launch = "accelerate launch --num_processes 2 -m "
    write_json(folder / "run.json", {**values, "command": f"{launch}vlafit train quickstart", "processes": 2})
    commands = {one["for"]: one["command"] for one in json_of(folder)["commands"]}
    again = shlex.split(commands["the same run again"])
    assert again == [*launch.split(), "vlafit", "train", f"{folder}/recipe.toml", "--out", "runs/again"]
    assert shlex.split(commands["this page again"]) == ["vlafit", "report", str(folder)]
    assert shlex.split(commands["its evaluation again"])[2] == f"{folder}/checkpoints/step_000400"


def test_without_before_and_after_the_newest_evaluation_is_the_headline(run: Path):
    for name in ("before", "after", "wrong_instruction"):
        shutil.rmtree(run / "eval" / name)
    assert "success, step 200" in html_of(run)


def test_an_interrupted_evaluation_is_left_out_and_told(run: Path):
    (run / "eval" / "after" / "result.json").unlink()
    said = json_of(run)
    assert "after" not in said["success"]
    assert "Evaluation 'after' stopped after 50 episodes; it is left out." in said["missing"]


def test_a_run_without_rollouts_has_curves_and_no_headline(tmp_path: Path):
    recipe = dataclasses.replace(RECIPE, eval=dataclasses.replace(RECIPE.eval, protocol=""))
    run = write_run(tmp_path / "run", recipe)
    shutil.rmtree(run / "eval")
    text = html_of(run)
    assert "The recipe names no protocol" in text
    assert 'class="headline"' not in text
    assert "<svg" in text


@pytest.mark.parametrize("damage", ["{", "[]", '{"overall": 3}'])
def test_a_damaged_result_is_left_out_and_told(run: Path, damage: str):
    (run / "eval" / "after" / "result.json").write_text(damage)
    assert "Evaluation 'after' is left out: its result.json cannot be read" in " ".join(
        json_of(run)["missing"]
    )


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
def test_a_damaged_run_or_plan_file_is_told(run: Path, name: str):
    (run / name).write_text("{")
    assert f"{name} cannot be read" in " ".join(json_of(run)["missing"])


def test_a_film_that_is_gone_is_left_out(run: Path):
    for path in (run / "eval" / "after" / "videos").glob("*"):
        path.unlink()
    assert html_of(run).count("data:image/png;base64,") == 4


def test_films_stop_at_the_budget_and_the_page_says_so(whole: Path):
    facts = report.read_facts(whole)
    films, one = Films(budget=100), facts.evaluations["after"]
    assert films.strip(one, one.filmed[0]).html == ""
    assert "1 films did not fit" in films.left_out()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(VlafitError, match=rf"^{tmp_path} .*no recipe\.toml.*not a run"):
        report.build(tmp_path)
    with pytest.raises(VlafitError, match="does not exist"):
        report.build(tmp_path / "nowhere")


def test_a_damaged_line_of_metrics_is_left_out_and_named_by_its_number(run: Path):
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": 2.0}\n{"step\xff": 2}\n')
    report.build(run)
    assert "1 lines of metrics.jsonl are damaged and left out (line 2)." in (run / "report.html").read_text()


# ---------------------------------------------------------------------------------------- pictures


def test_scores_are_read_from_a_run_folder_or_its_json(whole: Path):
    assert read_scores(whole) == read_scores(whole / "report.json")
    assert read_scores(whole)["after"] == Score(47, 50)


def test_a_json_that_is_no_report_is_refused(tmp_path: Path):
    with pytest.raises(VlafitError, match="cannot read"):
        read_scores(tmp_path)
    (tmp_path / "report.json").write_text('{"success": 3}')
    with pytest.raises(VlafitError, match="is not a report"):
        read_scores(tmp_path)


def test_arms_are_compared_in_a_png():
    arms = [
        Arm("full pretrained checkpoint", (Score(24, 25), Score(23, 25), Score(25, 25))),
        Arm("pretrained, fresh action expert", (Score(10, 25), Score(6, 24, 1), Score(8, 25))),
        Arm("same architecture, untrained", (Score(0, 25),)),
    ]
    with Image.open(io.BytesIO(ablation_figure(arms, "Success by what was loaded"))) as picture:
        assert picture.format == "PNG"
    with pytest.raises(VlafitError, match="at least one arm"):
        ablation_figure([])


def test_a_run_without_evaluations_has_no_picture(run: Path):
    shutil.rmtree(run / "eval")
    with pytest.raises(VlafitError, match="no finished evaluation to draw"):
        result_figure(report.read_facts(run))


def test_answers_that_were_no_chunk_of_actions_are_told(run: Path):
    assert "invalid_answers" not in json.dumps(json_of(run)["evaluations"])
    file = run / "eval" / "after" / "episodes.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    counted = [line | {"invalid_answers": int(number == 0)} for number, line in enumerate(lines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in counted))
    answers = sum(line["replans"] for line in lines)
    said = json_of(run)["evaluations"]["after"]
    assert said["invalid_answers"] == {"answers": answers, "invalid": 1, "rate": round(1 / answers, 6)}
    assert sum(episode["invalid_answers"] for episode in said["episodes"]) == 1
    assert f"after: 1 of {answers} answers were no chunk of actions" in html_of(run)


def test_an_evaluation_that_is_left_out_is_a_warning_too(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = run / "eval" / "after" / "result.json"
    result = json.loads(file.read_text())
    result["overall"]["rate"] = 0.99
    file.write_text(json.dumps(result))
    facts = report.read_facts(run)
    (said,) = [line for line in facts.missing if line.startswith("Evaluation 'after' is left out: ")]
    assert f"{file}: overall: rate is 0.99, but by the counts of its tasks it is" in said
    assert said in caplog.messages and "after" not in facts.evaluations
