"""A file of another family among a checkpoint's: config.json or processors are named with both families."""

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints.foreign import LAYOUTS, Layout
from tests.variants import variants
from vlafit import checkpoints
from vlafit.checkpoints.formats.lerobot.read_config import TYPES
from vlafit.errors import VlafitError, WeightsError

FIXTURES = Path(__file__).parents[1] / "fixtures"
TYPES_OF = {
    "OpenVLA": ("openvla",),
    "GR00T": ("groot", "Gr00tN1d7"),
    "X-VLA": ("xvla",),
    "pi0-FAST": ("pi0_fast",),
}
STATED = [  # all that LeRobot writes for a policy that is read here, one of another, and other programs' key
    *(({"type": kind, "chunk_size": 4, "input_features": {}}, kind) for kind in (*TYPES, "act")),
    *(({"model_type": kind}, kind) for kind in ("Gr00tN1d7", "openvla", "xvla")),
]
FILES = [one for one in LAYOUTS if "JAX" not in one.name]
FOLDERS = {
    "smolvla": FIXTURES / "lerobot_smolvla",
    "xvla": FIXTURES / "lerobot_xvla",
    "groot": FIXTURES / "lerobot_groot",
}
PROCESSORS = {**FOLDERS, "pi0_fast": FIXTURES / "lerobot_pi0_fast" / "processors"}


def own_types(layout: Layout) -> tuple[str, ...]:
    """What config.json may say of the policy in this layout."""
    last = (
        layout.name.removesuffix(" of December 2025").removesuffix(" with FiLM").removesuffix(" by diffusion")
    )
    word = last.removesuffix("-OFT").split()[-1]
    return TYPES_OF.get(word, ("pi0",) if word == "transformers" else (word.lower(),))


@pytest.mark.parametrize(
    "layout", variants(FILES, always=FILES[:4:2] + FILES[6:12]), ids=lambda one: one.name
)
def test_a_config_of_another_family_is_named_with_the_family_of_the_tensors(layout: Layout, tmp_path: Path):
    layout.write(tmp_path)
    own, others = own_types(layout), 0
    for values, kind in STATED:
        (tmp_path / "config.json").write_text(json.dumps(values))
        if kind in own:
            continue
        with pytest.raises(
            WeightsError, match=rf"config.json says (model_)?type {kind!r}, the tensors are those of"
        ):
            checkpoints.inspect(tmp_path, config=layout.told)
        others += 1
    assert len(STATED) - 2 <= others < len(STATED)


@pytest.mark.parametrize("own", FOLDERS)
@pytest.mark.parametrize("other", PROCESSORS)
def test_processors_of_another_family_are_named_with_both(own: str, other: str, tmp_path: Path):
    folder = Path(shutil.copytree(FOLDERS[own], tmp_path / "copy"))
    told: dict[str, object] = {"image_size": 64} if own == "xvla" else {}
    for path in folder.glob("policy_*"):
        path.unlink()
    for path in PROCESSORS[other].glob("policy_*"):
        shutil.copy(path, folder)
    if own == other:
        checkpoints.declaration(folder)
        return
    for look in (lambda: checkpoints.declaration(folder), lambda: checkpoints.inspect(folder, config=told)):
        with pytest.raises(VlafitError) as caught:
            look()
        for fact in ("policy_p", f"that of {other}", f"type '{own}'", "another checkpoint"):
            assert fact in str(caught.value)
