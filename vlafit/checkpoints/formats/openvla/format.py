"""OpenVLA's folders, with OFT's component files beside them; written back in the same layout."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.codecs import GIVE_ASSETS, GIVE_TOKENIZER, ChosenCodec, require_vocabulary
from vlafit.checkpoints.declaration import Declaration
from vlafit.checkpoints.formats import stated_type
from vlafit.checkpoints.formats.base import AdapterSupport, CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.native.read import CODEC
from vlafit.checkpoints.formats.openvla import files as layout
from vlafit.checkpoints.formats.openvla import film, names, statistics
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.options import LoadOptions, OptionTable
from vlafit.checkpoints.voting import Stated
from vlafit.codec import Codec, CodecSet, Tokenizer
from vlafit.codec import tokenizer as tokenizers
from vlafit.codec.described import learned
from vlafit.codec.normaliser import OPENVLA
from vlafit.errors import WeightsError
from vlafit.files import parse_json
from vlafit.nn.deferred import save_tensors
from vlafit.nn.policy import Policy
from vlafit.policies.openvla import TOKEN_HEADS, OpenVLA

MAX_TOKENS = 96  # of a prompt; no program limits it
ROOM = 32  # dimensions of a state that is not read, where nothing says how many there are; pi0's
GRIPPER = (
    "OpenVLA's data have 0 for a closed and 1 for an open one; a robot that takes others for them: --config "
    "'openvla.gripper=[CLOSED, OPEN]' ([1, -1] of LIBERO)"
)
STEP = "vlafit"  # in the names of component files, where OFT has the training step
COMPONENTS = {
    "action_head": names.HEAD,
    "proprio_projector": names.PROPRIO,
    "noisy_action_projector": names.NOISE,
}


class OpenVLAAdapters(AdapterSupport):
    """peft puts adapters on the modules of OpenVLA's class."""

    def names(self, family: str) -> NameMap | None:
        """Return the names of the modules in memory."""
        return names.NAMES if family == "openvla" else None

    def refusals(self, policy: Policy, layers: Sequence[str]) -> list[str]:
        """Say which layers are none of the base's, to which OFT adds adapters only."""
        apart = [
            one
            for one in layers
            if ".film." in one or names.NAMES.file_name(f"{one}.weight").startswith(names.NAMES.apart)
        ]
        return [f"{apart[0]} is in a file of its own there: add --merge"] if apart else []

    def codec_folder(self, folder: Path, base: Path) -> Path:
        """Return the folder of the run's statistics, else that of the base."""
        return layout.described_in(base, folder)


class OpenVLAFormat(Format):
    """The checkpoints that OpenVLA and OpenVLA-OFT publish and save."""

    name = names.FORM
    target = "openvla"
    takes_deferred = True
    holds_columns = True  # a gripper of 0 and 1; `refusals` names everything else
    files = ("*--*_checkpoint.pt", "tokenizer.model")
    options = (
        OptionTable(
            "openvla", "OpenVLA's checkpoints: the cameras and bounds of a codec, which none records"
        ),
    )
    layouts = {"OpenVLA": ("vision_backbone.", "language_model.model.layers.")}  # noqa: RUF012
    adapters = OpenVLAAdapters()

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are OpenVLA's."""
        return names.recognise(files.tensor_names)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names of the base and OFT's files, and read config.json."""
        stated_type.require(files.folder, str(files.path), names.FORM, layout.MODEL_TYPE)
        stored = dict(files.tensors)
        chosen, beside = layout.components_for(files.folder, options.adapters)
        for module, file in chosen.items():
            more = layout.component_tensors(module, file)
            if module == layout.TOWERS:  # as they were trained with FiLM, all of them
                stored = {n: t for n, t in stored.items() if not n.startswith(f"{layout.TOWERS}.")}
            twice = sorted(set(more) & set(stored))
            if twice:
                raise WeightsError(f"{file}: tensor {twice[0]!r} is also in another file of the checkpoint")
            stored |= more
        tensors = layout.unwrapped(stored, str(files.path))
        values, stated = layout.evidence(files.folder)
        values.setdefault("max_tokens", MAX_TOKENS)
        described = layout.described_in(files.folder, options.adapters)
        notes = beside + _head(values, tensors, parse_head(options), str(files.path))
        values["proprio"] = any(name.startswith(names.PROPRIO) for name in tensors)
        # A head that reads no state has no width of one: the caller is asked for it.
        has_width = values["head"] in TOKEN_HEADS or values["proprio"]
        widths = statistics.widths(described, options.assets)
        stated += [one for one in widths if has_width or one.key != "state_dim"]
        if not values["proprio"]:
            stated += _unread_state(stated, options, str(files.path), values["head"], tensors)
        values["film"] = any(".blocks.0.scale." in name for name in tensors)
        own = CodecSet.load(described) if (described / CODEC).is_file() else None
        return OpenedCheckpoint(
            str(files.path),
            self,
            "openvla",
            layout.called_as_stored(names.read(tensors), stored),
            ConfigEvidence(values, stated, fixed=("max_tokens", "eos")),
            codec_folder=files.folder,
            own_codec=own,
            notes=tuple(notes),
        )

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Return our own codec where it lies beside, else that of the statistics that the caller chooses."""
        where, table = opened.path, options.config.table("openvla")
        if opened.own_codec is not None:
            options.config.refuse("openvla", where, "codec.json lies beside the weights")
            return super().codec(opened, policy, options)
        assert opened.codec_folder is not None
        available = statistics.sets(opened.codec_folder)
        unchosen = len(available) > 1 and options.assets is None
        words = _tokenizer(opened.codec_folder, options)
        chosen = statistics.parse_options(table, where)
        unread, silent = not reads_state(policy), ""
        if available and (options.assets is not None or len(available) == 1):
            name = statistics.choose(available, options.assets, where)
            silent = name if unread and statistics.lacks_states(available[name]) else ""
        lacks = [
            *(["statistics (dataset_statistics.json)"] if not available else []),
            *(
                [f"a choice of one of its statistics ({', '.join(available)}): {GIVE_ASSETS}"]
                if unchosen
                else []
            ),
            *([f"a tokenizer: give {GIVE_TOKENIZER}"] if words is None and not unchosen else []),
            *(
                ["the names of its cameras: give config {'openvla.cameras': [...]}"]
                if not chosen.cameras
                else []
            ),
            *(
                [
                    f"the width of the robot's state, because the statistics of {silent} have none (proprio) "
                    "and this head does not read it: give config {'openvla.state_dims': N}"
                ]
                if silent and not chosen.state_dims
                else []
            ),
        ]
        if lacks or words is None:
            reason = f"the checkpoint lacks {'; and '.join(lacks)}"
            if options.assets is not None or table:
                raise WeightsError(f"{where}: {reason}")
            return ChosenCodec(None, reason)
        name = statistics.choose(available, options.assets, where)
        codec = statistics.make_codec(
            name, available[name], policy.needs(), words, chosen, where, reads_state=not unread
        )
        require_vocabulary(codec, policy, where)
        notes = [f"statistics of {name}"]
        if silent:
            notes.append(f"the statistics of {name} have no states, which this head does not read")
        return ChosenCodec(codec, notes=tuple(notes))

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether there are statistics, and no tokenizer beside."""
        return _own_tokenizer(files.folder) is None and bool(statistics.sets(files.folder))

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return the names of several sets of statistics; the files do not describe the robot."""
        named = tuple(statistics.sets(files.folder))
        return Declaration(
            says_relative=False,
            says_frame_sizes=False,
            own_tokenizer=_own_tokenizer(files.folder),
            unsaid={"gripper": GRIPPER},
            codec_options="policy.config.openvla.cameras" if named else "",
            named_statistics=named if len(named) > 1 else (),  # the only set needs no choice
        )

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what OpenVLA's files cannot hold."""
        if not isinstance(policy, OpenVLA):
            return ["it only holds OpenVLA and OpenVLA-OFT"]
        if codec is None:
            return []
        c, robot, reasons = codec.config, codec.embodiment, []
        for what, width, own in (
            ("states", c.state_dim if policy.config.proprio else 0, robot.state.shape[0]),
            ("actions", c.action_dim, robot.action.shape[0]),
        ):
            if width and width != own:
                reasons.append(
                    f"its {what} are as wide as the robot's ({own}), this policy's are {width} wide"
                )
        for what, method in (("states", c.normalisation), ("actions", c.of_actions)):
            if method not in OPENVLA:
                reasons.append(f"it normalises {what} by {' or '.join(OPENVLA)}, this codec by {method}")
        if (c.prompt, c.framing) != ("openvla", "openvla"):
            reasons.append(f"its prompts and frames are its own, this codec's are {c.prompt} and {c.framing}")
        if any(c.relative):
            reasons.append("its actions are never relative to the state")
        if not _is_gripper(codec):
            reasons += [f"openvla does not repeat this of its codec: {point}" for point in learned(codec)]
        return reasons

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write config.json, weights, OFT's files as safetensors, statistics, and our codec."""
        assert isinstance(policy, OpenVLA)
        tensors = names.written({n: p.detach().cpu() for n, p in policy.named_parameters()})
        saved = []
        for module, prefix in COMPONENTS.items():
            own = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
            if own:
                saved.append(f"{module}--{STEP}_checkpoint")
                save_tensors({n: t.contiguous() for n, t in own.items()}, folder / f"{saved[-1]}.safetensors")
        if policy.config.film:
            towers = {n: t for n, t in tensors.items() if n.startswith(f"{layout.TOWERS}.")}
            saved.append(f"{layout.TOWERS}--{STEP}_checkpoint")
            own = {n: t.contiguous() for n, t in film.written(towers).items()}
            save_tensors(own, folder / f"{saved[-1]}.safetensors")
        save_tensors(  # with the towers as OpenVLA's class has them, which is loaded first
            {n: t.contiguous() for n, t in tensors.items() if not film.is_film(n)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        described = describe(policy)
        notes = [
            "OpenVLA's program also reads its tokenizer, preprocessor_config.json and Python files from this "
            "folder: copy those of the checkpoint that it began with (openvla/openvla-7b)"
        ]
        if saved:
            notes.append(
                "OpenVLA-OFT reads pickles: torch.save(safetensors.torch.load_file('X.safetensors'), 'X.pt') "
                f"for {' and '.join(saved)}"
            )
        if policy.config.film:
            notes.append(
                f"load it with use_film: OpenVLA-OFT puts LoRA on the towers before it reads their file, "
                f"which therefore holds adapters of rank {film.RANK} (lora_rank) that change nothing"
            )
        if codec is None:
            notes.append("there is no codec: states and actions are in the units that the policy takes")
        else:
            codec.save(folder)
            text = statistics.written(codec)
            (folder / statistics.FILE).write_text(text, encoding="utf-8")
            described["norm_stats"] = parse_json(text)
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        return tuple(notes)


def describe(policy: OpenVLA) -> dict[str, object]:
    """Return config.json: what OpenVLA's class reads, and in a table of ours what it does not record."""
    c, lang = policy.config, policy.config.language
    side = c.vision.image_size
    return {
        "model_type": layout.MODEL_TYPE,
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": layout.COMPUTED["arch_specifier"],
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [side, side],
        "timm_model_ids": list(layout.TIMM),
        "timm_override_act_layers": [None, None],
        "n_action_bins": 256,
        "pad_to_multiple_of": max(lang.vocab - c.text_vocab, 0),
        "text_config": {
            "model_type": "llama",
            "hidden_size": lang.width,
            "intermediate_size": lang.mlp,
            "num_hidden_layers": lang.depth,
            "num_attention_heads": lang.heads,
            "num_key_value_heads": lang.kv_heads,
            "rms_norm_eps": lang.eps,
            "vocab_size": lang.vocab,
            "eos_token_id": c.eos,
        },
        layout.OWN: {
            "head": c.head,
            "chunk": c.chunk,
            "max_tokens": c.max_tokens,
            **({} if c.proprio or c.writes_tokens else {"state_dim": c.state_dim}),
            **{f"vision.{t}.heads": asdict(c.vision)[t]["heads"] for t in ("dino", "siglip")},
        },
    }


def reads_state(policy: Policy) -> bool:
    """Whether the policy's answers depend on the state."""
    return not isinstance(policy, OpenVLA) or policy.config.proprio


def _unread_state(
    stated: Sequence[Stated], options: LoadOptions, where: str, head: str, tensors: Mapping[str, Tensor]
) -> list[Stated]:
    """Return room for a state that the head does not read, where nothing says how wide it is.

    Raises WeightsError where there is an action head, beside which OFT usually saves a state projection.
    """
    if any(one.key == "state_dim" for one in stated) or "state_dim" in options.config.widths:
        return []
    if head not in TOKEN_HEADS:
        if options.config.fields.get("proprio") or not any(name.startswith(names.HEAD) for name in tensors):
            return []  # fresh ones
        raise WeightsError(
            f"{where}: there is an action head and no state projection: copy proprio_projector--N_checkpoint "
            "into the folder. Where the policy was trained without states (use_proprio false), say how many "
            "dimensions the robot's state has: config state_dim=8, for example"
        )
    chosen = statistics.parse_options(options.config.table("openvla"), where)
    return [Stated("state_dim", max(chosen.state_dims, ROOM), "room for a state that is not read")]


def parse_head(options: LoadOptions) -> str:
    """Return the head that the caller asks for (by its sizes: the L1 head); "" where he does not."""
    fields = options.config.fields
    return str(fields.get("head", "l1" if "expert" in fields else ""))


def _head(values: dict[str, Any], tensors: Mapping[str, Tensor], asked: str, where: str) -> list[str]:
    """Add to `values` how actions are written, and what follows from it; return notes.

    Raises WeightsError where the caller asks for a head other than the one that is there.
    """
    there = ""
    if any(name.startswith(names.DIFFUSION) for name in tensors):
        there = "diffusion"
    elif any(name.startswith(names.HEAD) for name in tensors):
        there = "l1"
    if there:
        if asked not in ("", there):
            raise WeightsError(
                f"{where}: config: head is {asked!r}; the action head in the folder is {there!r}"
            )
        values["head"] = there
        return []
    asked = asked or values.get("head", "")
    besides = [name for name, prefix in COMPONENTS.items() if any(t.startswith(prefix) for t in tensors)]
    if besides and not asked:
        raise WeightsError(
            f"{where}: {besides[0]} is there, and no action head: copy action_head--N_checkpoint into the "
            "folder. Where the actions are tokens, say which: config head=parallel_tokens (OFT's) or "
            "head=tokens (OpenVLA's)"
        )
    values["head"] = asked or "tokens"
    if values["head"] not in TOKEN_HEADS:
        return []
    values["expert"] = {"width": 0, "blocks": 0}
    if values["head"] == "tokens":
        values.setdefault("chunk", 1)
    if asked:
        return []
    return [
        "there is no action head: actions are OpenVLA's tokens. OFT's tokens in parallel: config head = "
        '"parallel_tokens"; to train an action head: head = "l1" and policy.fresh = ["expert"]'
    ]


def _tokenizer(folder: Path, options: LoadOptions) -> Tokenizer | None:
    """Return the caller's tokenizer, else the one in the folder."""
    words, own = options.open_tokenizer(), _own_tokenizer(folder)
    return tokenizers.load(own) if words is None and own is not None else words


def _own_tokenizer(folder: Path) -> Path | None:
    files = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((file for file in files if file.is_file()), None)


def _is_gripper(codec: Codec) -> bool:
    """Whether all that is learned in another form is the last dimension, a gripper as OpenVLA's data have it.

    The programs that play OpenVLA turn its 0 and 1 into the robot's values themselves.
    """
    config = codec.config
    last = codec.embodiment.action.shape[0] - 1
    ours = [one.dimension for one in config.action_form.grippers] == [last] and not config.action_form.poses
    return ours and bool(config.unchanged) and config.unchanged[-1] and len(learned(codec)) == 1


FORMAT = OpenVLAFormat()
