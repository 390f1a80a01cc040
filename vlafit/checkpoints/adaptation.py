"""Make the codec of a checkpoint fit one robot by what its files lack and the caller says.

The files of a public checkpoint name the cameras of its own program, and often neither its tokenizer nor all
of its settings. Without any of these the codec stays what the files say.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlafit import arguments
from vlafit.agreement import Item, describe_mask
from vlafit.checkpoints.named_tokenizer import open_named
from vlafit.codec import Codec, CodecSet
from vlafit.codec.prompts import holds_state
from vlafit.codec.seen import LARGEST_FRAME, camera_items, with_cameras
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import ConfigError
from vlafit.observations import short
from vlafit.policies import merge_dotted


@dataclass(frozen=True)
class Adaptation:
    """What the caller says of a checkpoint; see `vlafit.load_actor`."""

    config: Mapping[str, object] | None = None
    tokenizer: str | Path | Tokenizer | None = None
    assets: str | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    frame_size: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for arguments of another type, or an impossible size."""
        arguments.whole("frame_size", self.frame_size, 0, LARGEST_FRAME)
        arguments.table("cameras", self.cameras)
        if self.config is not None and not isinstance(self.config, Mapping):
            raise ConfigError(f"config must be a map of keys to values, or None, not {short(self.config)}")
        if self.assets is not None:
            arguments.text("assets", self.assets, empty=False)
        if self.tokenizer is not None and not isinstance(self.tokenizer, Tokenizer):
            arguments.path("tokenizer", self.tokenizer)

    @property
    def says_nothing(self) -> bool:
        """Whether the checkpoint's files alone decide."""
        given = self.config, self.cameras, self.frame_size
        return not any(given) and self.tokenizer is None and self.assets is None

    def open_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer. Raises as `open_named` does."""
        words = self.tokenizer
        return words if words is None or isinstance(words, Tokenizer) else open_named(str(words))

    def applied(self, codecs: CodecSet, embodiment: str, where: str) -> tuple[CodecSet, tuple[Item, ...]]:
        """Return the codecs with the robot's cameras, and what was chosen.

        Raises ConfigError where none of several embodiments is named, and as `with_cameras` does.
        """
        if not self.cameras and not self.frame_size:
            return codecs, ()
        own = codecs.choose(embodiment, where=where, option="embodiment=NAME")
        new = with_cameras(own, self.cameras, self.frame_size, where)
        every = [new if codec is own else codec for codec in codecs]
        return CodecSet(every), tuple(camera_items(own, new))

    def left_open(self, unsaid: Mapping[str, str], codec: Codec) -> Iterator[Item]:
        """Yield what holds where the checkpoint's files leave it open (`Declaration.unsaid`)."""
        config, given = codec.config, merge_dotted({}, self.config or {})
        prompt = ""
        if config.prompt is not None and (holds_state(config.prompt) or "state_input" in given):
            count = max(config.prompt_state, codec.columns.state_dimensions) * holds_state(config.prompt)
            prompt = f"{config.prompt}, with {count or 'no'} numbers of the state"
        grippers = "; ".join(f"{one.zero:g} closed, {one.one:g} open" for one in config.action_form.grippers)
        values = {
            "relative actions": describe_mask(config.relative),
            "prompt": prompt,
            "gripper": grippers or "as in its data" * any(config.unchanged),
        }
        said = {
            "relative actions": "relative" in given.get("codec", {}),
            "gripper": bool(grippers),
            "prompt": "state_input" in given or "lerobot" in given,
        }
        for name, how in unsaid.items():
            if values[name]:
                status = "chosen" if said[name] else "assumed"
                yield Item(name, {}, values[name], status, "config" if said[name] else how)

    def identity(self, codecs: CodecSet) -> str:
        """Return what it adds to the identity of an actor with these codecs; "" where it says nothing."""
        if self.says_nothing:
            return ""
        digest = hashlib.sha256(json.dumps(dict(self.config or {}), sort_keys=True, default=str).encode())
        with tempfile.TemporaryDirectory() as folder:
            codecs.save(Path(folder))
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(file.relative_to(folder).as_posix().encode())
                digest.update(file.read_bytes())
        return f" adapted sha256:{digest.hexdigest()}"
