"""The model card of a checkpoint: README.md with base, licence, data, strategy, results and how to load it.

It only documents, so it is not in the manifest: whoever publishes a checkpoint may rewrite it. Its results
are sentences that `vlafit.report.card_results` makes of the evaluations of this very checkpoint.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlafit import files, shipped
from vlafit.agreement import AS_STORED, CONVERSIONS, Agreement
from vlafit.checkpoints.history import Lineage
from vlafit.checkpoints.tensor_files import read_text
from vlafit.codec import Codec, CodecSet, described
from vlafit.errors import VlafitError
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import Policy
from vlafit.policies import family_name

FILE = "README.md"
LICENCE = re.compile(
    r"^(?:license:|\| *licen[sc]e(?: of the base)? *\|) *([^|\n]+)", re.MULTILINE | re.IGNORECASE
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")
PLACE = "path/to/this/folder"  # in a card, which is read where the folder was put
NONE = "None is recorded. Measure it before you use it: `vlafit eval FOLDER --protocol P` or `--data CARD`."
PROMISED = ("lerobot", "openpi")  # targets of which a card says why they cannot hold the policy
VLAFIT = """```python
import vlafit

actor = vlafit.load_actor("{folder}"{embodiment})
```"""
LEROBOT = """```python
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

folder = "{folder}"
config = PreTrainedConfig.from_pretrained(folder)
{policy}
before, after = {processors}


def act(observation):  # tensors by the names in config.input_features, images from 0 to 1, and "task": a text
    return after(policy.select_action(before(observation)))
```"""
LEROBOT_WHOLE = "policy = get_policy_class(config.type).from_pretrained(folder)"
LEROBOT_ADAPTERS = """from peft import PeftConfig, PeftModel

base = PeftConfig.from_pretrained(folder).base_model_name_or_path  # an absolute path, in adapter_config.json
policy = get_policy_class(config.type).from_pretrained(base, config=config)
policy = PeftModel.from_pretrained(policy, folder).get_base_model().eval()"""
# LeRobot up to 0.6.1 looks for the tokenizer in the working directory.
LEROBOT_TOKENIZER = """make_pre_post_processors(
    config, folder, preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": f"{folder}/tokenizer"}}
)"""
LEROBOT_NO_TOKENIZER = "make_pre_post_processors(config, folder)"
OPENPI = """In openpi's checkout, with a config whose model has the sizes in config.json of this folder:

```sh
uv run scripts/serve_policy.py policy:checkpoint --policy.config CONFIG --policy.dir {folder}
```"""
TRANSFORMERS = """```python
from transformers import PI0ForConditionalGeneration

policy = PI0ForConditionalGeneration.from_pretrained("{folder}").eval()
```"""
MERGE = "Adapters stay adapters where the program loads them; `--merge` folds them into the weights."
Holders = Mapping[str, tuple[str, str]]
"""Target of an export -> its name, and why it cannot hold the policy; "" where it can."""


def card(
    policy: Policy,
    codec: Codec | CodecSet | None,
    *,
    recipe: str | None = None,
    history: Lineage | None = None,
    agreement: Agreement | None = None,
    results: tuple[str, ...] = (),
    target: str = "vlafit",
    adapters: bool = False,
    holders: Holders | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the text of a model card. `target` is the format that the checkpoint is written in.

    `agreement` is that of the run's data, which tells how the robot's values were made of its files.
    `adapters` says that the policy has some, in a PEFT folder of their own where `target` is another program.
    `holders` are the formats that it can be exported to. `notes` are what its writer says of the folder.
    """
    values = _values(recipe or "")
    base = str(values.get("policy", {}).get("checkpoint") or "")
    licence = licence_of(base) if base else ""
    name = str(values.get("name") or "policy")
    rows = [
        *_rows(policy, codec, values, history or Lineage(), base, licence),
        *_delays(policy, target),
        *_conversions(agreement),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows)])
    purpose = str(values.get("purpose") or "")
    listed = "\n".join(f"- {line}" for line in results) or NONE
    parts = [
        _front(base, licence, target),
        f"# {name}",
        purpose,
        table,
        "## Results",
        listed,
        "## Load",
        _load(policy, target, codec, adapters, holders or {}, notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def refresh(folder: Path, results: Sequence[str]) -> None:
    """Put the sentences of `results` into the card of a checkpoint, if it has one."""
    path = folder / FILE
    if not results or not path.is_file():
        return
    text = read_text(path)
    listed = "\n".join(f"- {line}" for line in results)
    begin, end = text.find("## Results\n"), text.find("## Load\n")
    if 0 <= begin < end:
        files.write_atomic(path, f"{text[:begin]}## Results\n\n{listed}\n\n{text[end:]}")


def licence_of(base: str) -> str:
    """Return the licence that a base states in its README.md; for one of the Hub, where to find it."""
    folder = Path(base)
    if not folder.is_dir():
        try:
            folder = shipped.find("checkpoint", base)
        except VlafitError:
            hub = HUB_ID.fullmatch(base)
            return f"see https://huggingface.co/{base.partition('@')[0]}" if hub else ""
    readme = folder / FILE
    stated = (
        LICENCE.search(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    )
    return stated[1].strip() if stated else ""


def _values(recipe: str) -> Mapping[str, Any]:
    """Return a recipe's values; none of a text that is no TOML, because the card only documents."""
    try:
        return tomllib.loads(recipe)
    except tomllib.TOMLDecodeError:
        return {}


def _rows(
    policy: Policy,
    codec: Codec | CodecSet | None,
    recipe: Mapping[str, Any],
    history: Lineage,
    base: str,
    licence: str,
) -> Iterator[tuple[str, str]]:
    count = sum(p.numel() for p in policy.parameters())
    yield "policy", f"{family_name(policy)}, {count / 1e6:,.1f} M parameters"
    if recipe:
        yield "started from", f"`{base}`" if base else "untrained weights"
    if base:
        yield "licence of the base", licence or "not stated by the base: find it out before you publish"
    if recipe.get("strategy"):
        yield "strategy", f"`{recipe['strategy']}`"
    for learned in history.datasets:
        size = f"{learned.episodes} episodes, {learned.frames} frames"
        if not learned.episodes:
            size = f"{learned.frames} questions about images"
        yield "learned from", f"{learned.card}: {size} (sha256 {learned.sha256[:12]})"
    if history.made:
        yield "afterwards", history.made
    for one in () if codec is None else CodecSet.of(codec):
        robot = one.embodiment
        cameras = ", ".join(name for name in one.config.cameras if name)
        yield "robot", f"{robot.name}, {robot.hz:g} Hz, control {robot.control or 'not stated'}"
        yield "sees", f"{cameras}; {robot.state.shape[0]} state dimensions"
        yield "answers", f"{one.config.answered} steps of {robot.action.shape[0]} actions"
        if any(one.config.relative) and not one.config.relative_to:
            yield "actions", _relative(one)
        yield "normalisation", one.config.normalisation
        yield from (("learns", point) for point in described.learned(one))


def _relative(codec: Codec) -> str:
    """Return which actions are learned as differences; answers are what the robot takes."""
    action, relative = codec.embodiment.action, codec.config.relative
    names = action.labels or tuple(map(str, range(len(relative))))
    chosen = [name for name, on in zip(names, relative, strict=True) if on]
    which = "all" if len(chosen) == len(relative) else f"dimensions {', '.join(chosen)}"
    return f"{which} learned relative to the state from which the chunk is predicted; answered absolute"


def _delays(policy: Policy, target: str) -> Iterator[tuple[str, str]]:
    """Yield how many first steps of a chunk the policy can be given; no other program gives it any."""
    if target == "vlafit" and isinstance(policy, FlowPolicy) and policy.max_delay:
        yield (
            "real-time chunking",
            f"trained with the first 0 to {policy.max_delay} steps of a chunk given (`train.max_delay`): "
            "up to so many are continued without guidance",
        )


def _conversions(agreement: Agreement | None) -> Iterator[tuple[str, str]]:
    """Yield how states and actions differ from those in the dataset's files, for whoever calls the policy."""
    for item in agreement.items if agreement is not None else ():
        owner, _, name = item.name.rpartition(": ")
        text = item.sides.get("dataset", AS_STORED)
        if name in CONVERSIONS and text != AS_STORED:
            whose = f"{owner}: " if owner else ""
            does = "send states" if name.startswith("state") else "execute actions"
            yield (
                "values",
                f"{whose}{CONVERSIONS[name]} are those of the dataset's files {text}; {does} so converted, "
                "not as in the files",
            )


def _front(base: str, licence: str, target: str) -> str:
    """Return the YAML header that the Hugging Face Hub reads."""
    lines = ["---", f"library_name: {target.partition('-')[0]}", "pipeline_tag: robotics"]
    if re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        lines.append(f"license: {licence.lower()}")
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        lines.append(f"base_model: {base.partition('@')[0]}")
    return "\n".join([*lines, "tags: [robotics, vision-language-action, vlafit]", "---"])


def _load(
    policy: Policy,
    target: str,
    codec: Codec | CodecSet | None,
    adapters: bool,
    holders: Holders,
    notes: Sequence[str],
) -> str:
    """Return how to load the folder in its own program and in vlafit, and how to write it for others."""
    folder = PLACE
    # LeRobot's pipeline of GR00T has no step that only tokenises.
    has_tokenizer_step = (
        family_name(policy) != "groot"
        and codec is not None
        and any(one.config.prompt for one in CodecSet.of(codec))
    )
    processors = LEROBOT_TOKENIZER if has_tokenizer_step else LEROBOT_NO_TOKENIZER
    lerobot = LEROBOT.replace("{folder}", folder)
    lerobot = lerobot.replace("{policy}", LEROBOT_ADAPTERS if adapters else LEROBOT_WHOLE)
    own = {
        "lerobot": lerobot.replace("{processors}", processors),
        "openpi": OPENPI.replace("{folder}", folder),
        "transformers": TRANSFORMERS.replace("{folder}", folder),
        "vlafit": "",
    }.get(target, f"This folder is for {holders.get(target, (target, ''))[0]}.")
    known = "\n".join(["What to know there:", "", *(f"- {note}" for note in notes)]) if notes else ""
    here = "In vlafit:\n\n" + VLAFIT.replace("{folder}", folder)
    if codec is None:
        here = "vlafit reads it as a checkpoint to train from."
    several = codec is not None and len(CodecSet.of(codec)) > 1
    one = " --embodiment NAME" if several else ""
    here = here.replace("{embodiment}", ', embodiment="NAME"' if several else "")
    others = [
        f"- {name} cannot hold it: {reason}"
        if reason
        else f"- for {name}: `vlafit export {folder} --to {other}{one} --out exported`"
        for other, (name, reason) in holders.items()
        if other not in (target, "vlafit") and (not reason or other in PROMISED)
    ]
    listed = "\n".join(["For other programs:", "", *others]) if others else ""
    merge = MERGE if adapters and any(line.startswith("- for") for line in others) else ""
    return "\n\n".join(part for part in (own, known, here, listed, merge) if part)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
