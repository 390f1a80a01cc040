"""Check a recipe before training: invalid values, strategies that do not fit, settings without effect.

`check` needs only the recipe. `meta_policy` and `plan_of` read only the headers of a checkpoint and build the
policy on the meta device; damage, and the codec, show when the run begins. `run_warnings` describes settings
that have less effect than they ask for.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from vlafit import checkpoints
from vlafit.checkpoints.named_tokenizer import open_named
from vlafit.datasets.split import groups_of
from vlafit.errors import ConfigError, StrategyError, did_you_mean
from vlafit.nn.policy import Policy
from vlafit.policies import build_family, family, family_name
from vlafit.recipe import Recipe, TrainRecipe
from vlafit.train import reconcile, stages
from vlafit.train.data import Data
from vlafit.train.dataloader import rows_per_process
from vlafit.train.delays import train_with_delays
from vlafit.train.feature_cache import folder_problem
from vlafit.train.memory_ladder import IGNORE, parse_memory
from vlafit.train.stages import Place
from vlafit.train.trackers import EXTRAS
from vlafit.tuning import Plan, Strategy, load_strategy, preview

AT_LEAST_ONE = ("train.steps", "train.draws", "train.log_every",
                "train.validation_batches", "eval.every_trials")  # fmt: skip
NOT_NEGATIVE = ("train.seed", "train.max_delay", "train.accumulate", "train.replicas",
                "train.validate_every", "train.save_every", "train.keep", "train.threads",
                "data.episodes_per_task", "data.shift_pixels", "data.workers", "optim.warmup_steps",
                "optim.schedule_steps", "optim.schedule_from", "optim.weight_decay", "optim.clip_norm",
                "train.max_seconds", "train.peak_tflops", "eval.every", "eval.workers", "eval.videos",
                "eval.samples")  # fmt: skip
# More of these is a slip, and would end hours later in missing memory, processes or disk.
AT_MOST = {"train.batch_size": 2**16, "train.draws": 2**12, "train.accumulate": 2**16,
           "train.validation_batches": 2**20, "data.workers": 1024, "eval.workers": 1024,
           "data.shift_pixels": 4096, "eval.samples": 10**6, "eval.every_trials": 10**5}  # fmt: skip
COUNTS = 10**9  # the most of what else is counted, such as steps
BELOW_ONE = ("data.validation", "optim.beta1", "optim.beta2", "optim.ema")
THREADS_PER_CORE = 4  # more slow a process down, and far more crash it
NEED_A_PROTOCOL = ("eval.before", "eval.every", "eval.wrong_instruction")
LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao"}


def check(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError for the first field of `recipe` that is invalid for this number of processes."""
    for problem in _problems(recipe):
        raise ConfigError(problem)
    parse_memory(recipe.train.memory)
    if recipe.optim.in_backward is True and processes > 1:
        raise ConfigError(
            f"optim.in_backward = true needs one process, and there are {processes}: a gradient would be "
            "used before it is summed over them; set it to false"
        )
    require_replicas(recipe.train, processes)
    if recipe.train.batch_size != "auto":
        rows_per_process(recipe.train.samples, recipe.train.micro_batches, processes)


def require_replicas(train: TrainRecipe, processes: int) -> None:
    """Raise ConfigError unless so many processes hold `train.replicas` copies that are sharded."""
    if train.replicas <= 1:
        return
    where = f"train.replicas = {train.replicas}"
    if not train.shards:
        raise ConfigError(
            f"{where} counts copies of a sharded policy, and train.sharding is {train.sharding!r}, of which "
            "each process holds a copy: set train.sharding to 'full' or 'gradients', or train.replicas to 1"
        )
    fitting = [number for number in range(1, processes // 2 + 1) if processes % number == 0]
    if processes > 1 and train.replicas not in fitting:
        raise ConfigError(
            f"{where}: each copy needs the same number of processes, at least 2, and there are {processes}: "
            f"set it to one of {', '.join(map(str, fitting))}; a copy on each process is train.sharding = "
            "'none'"
        )


def _problems(recipe: Recipe) -> Iterator[str]:
    def value(name: str) -> float:
        section, field = name.split(".")
        return vars(vars(recipe)[section])[field]

    counted = AT_LEAST_ONE if recipe.train.batch_size == "auto" else (*AT_LEAST_ONE, "train.batch_size")
    for name in counted:
        if not value(name) >= 1:
            yield f"{name} must be at least 1, is {value(name)}"
    not_negative = [n for n in NOT_NEGATIVE if n != "data.workers" or recipe.data.workers != "auto"]
    for name in not_negative:
        if not 0 <= value(name) < float("inf"):
            yield f"{name} must be at least 0, is {value(name)}"
    for name in (*counted, *not_negative):
        most = AT_MOST.get(name, COUNTS)
        if name != "train.seed" and value(name) > most:
            yield f"{name} must be at most {most}, is {value(name)}"
    for name in BELOW_ONE:
        if not 0 <= value(name) < 1:
            yield f"{name} must be at least 0 and below 1, is {value(name)}"
    for name in ("optim.lr", "optim.eps"):
        if not 0 < value(name) < float("inf"):
            yield f"{name} must be above 0, is {value(name)}"
    if not 0 <= recipe.optim.final_lr <= 1:
        yield f"optim.final_lr is a share of the peak and must be from 0 to 1, is {recipe.optim.final_lr}"
    if recipe.optim.schedule == "step" and not recipe.optim.schedule_steps:
        yield (
            'optim.schedule = "step" needs optim.schedule_steps, the step after which the learning rate is '
            "optim.final_lr of its peak; a constant one is optim.final_lr = 1.0"
        )
    for name in recipe.data.validation_sets:
        if not name or "/" in name:
            yield f"data.validation_sets: {name!r} cannot be part of a metric's name; use a word without '/'"
    if any(adapt.embodiments for adapt in recipe.adapt.embodiments.values()):
        yield "adapt.embodiments: a table of one embodiment has no embodiments in it; remove them"
    embodiments = list(dict.fromkeys(recipe.data.embodiments.values()))
    evaluated = recipe.eval.embodiment
    if evaluated and evaluated not in embodiments:
        yield (
            f"eval.embodiment {evaluated!r} is none of the names in data.embodiments"
            f"{did_you_mean(evaluated, embodiments)}"
        )
    if recipe.eval.protocol and len(embodiments) > 1 and not evaluated:
        yield (
            f"eval.protocol {recipe.eval.protocol!r} shows one robot, and the policy learns "
            f"{', '.join(embodiments)}: name the one to evaluate in eval.embodiment"
        )
    if recipe.train.seed >= 2**63:
        yield f"train.seed must be below 2^63, is {recipe.train.seed}"
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if recipe.train.threads > most:
        yield f"train.threads {recipe.train.threads} is far above the number of CPU cores; use at most {most}"
    if recipe.name in ("", ".", "..") or Path(recipe.name).name != recipe.name:
        yield f"name {recipe.name!r} must be a single folder name, because the run's folder is runs/NAME"
    elif not recipe.name.isprintable():
        yield f"name {recipe.name!r} holds a line break or another control character; leave it out"
    if not recipe.purpose.isprintable():
        yield f"purpose {recipe.purpose[:80]!r} holds a line break or another control character; leave it out"
    if recipe.optim.states in ("8bit", "cpu") and recipe.train.shards:
        yield (
            f'optim.states = "{recipe.optim.states}" cannot be sharded (train.sharding = '
            f"{recipe.train.sharding!r}): use "
            'optim.states = "fp32", of which each process then keeps a share'
        )
    if recipe.train.compile == "blocks" and recipe.train.recompute == "selective":
        yield (
            'train.recompute = "selective" cannot see into compiled blocks, which recompute what is cheap by '
            'themselves: use train.recompute = "none" or "full" with train.compile = "blocks"'
        )
    if recipe.train.compile == "blocks" and recipe.train.packing == "rows":
        yield (
            'train.packing = "rows" makes batches of as many lengths as there are batches, and train.compile '
            '= "blocks" would compile each: use train.packing = "none", or train.compile = "none"'
        )
    if recipe.train.weights == "bf16" and recipe.train.shards:
        yield (
            f'train.weights = "bf16" cannot be sharded (train.sharding = {recipe.train.sharding!r}), because '
            'norms stay fp32: use train.weights = "fp32", of which each process keeps a share with "full"'
        )
    if recipe.train.weights == "bf16" and recipe.train.precision == "fp32":
        yield 'train.weights = "bf16" needs train.precision = "bf16", because fp32 products read fp32 weights'
    if problem := folder_problem(recipe.train.cache):
        yield problem
    if recipe.optim.in_backward is True:
        yield from _in_backward(recipe)
    if recipe.train.batch_size == "auto" and recipe.train.memory == IGNORE:
        yield (
            f'train.batch_size = "auto" follows the forecast, which train.memory = "{IGNORE}" leaves out: '
            "give train.batch_size a number, or leave train.memory empty"
        )
    if recipe.train.frozen == "bf16" and recipe.train.precision == "fp32":
        yield 'train.frozen = "bf16" needs train.precision = "bf16", because fp32 products read fp32 weights'
    policy = recipe.policy
    if policy.checkpoint:
        fields = {"policy.family": policy.family, "policy.size": policy.size}
        ignored = [f"{name} {value!r}" for name, value in fields.items() if value]
        if ignored:
            yield (
                f'{" and ".join(ignored)}: the checkpoint defines it, so it must be "" with '
                "policy.checkpoint "
                "(policy.config changes single fields)"
            )
    elif policy.embodiment:
        yield (
            f"policy.embodiment {policy.embodiment!r} only applies to a checkpoint, but policy.checkpoint is "
            "empty; remove policy.embodiment"
        )
    elif policy.fresh:
        yield "policy.fresh only applies to a checkpoint, but policy.checkpoint is empty; remove policy.fresh"
    if not recipe.eval.protocol:
        for name in NEED_A_PROTOCOL:
            if value(name):
                yield f"{name} needs rollouts, but eval.protocol is empty; set it"
    known = [str(tracker) for tracker in LoggerType.list()]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in recipe.train.trackers:
        if name not in known:
            yield f"train.trackers: accelerate has no tracker {name!r}{did_you_mean(name, known)}"
        if name not in installed:
            package = f"'{EXTRAS[name]}'" if name in EXTRAS else name
            yield f"train.trackers: {name} is not installed; pip install {package}, or remove the tracker"


def _in_backward(recipe: Recipe) -> Iterator[str]:
    """Yield why steps in the backward pass do not go with other settings."""
    if recipe.train.accumulate > 1:
        yield (
            f"optim.in_backward = true frees each gradient at once, so none is left to add to: set "
            f"train.accumulate to 1, it is {recipe.train.accumulate}, or optim.in_backward to false"
        )
    if recipe.train.shards:
        yield (
            f"optim.in_backward = true needs whole gradients (train.sharding = {recipe.train.sharding!r}): "
            'set train.sharding to "none", or optim.in_backward to false'
        )
    if load_strategy(recipe.strategy).lowers_ranks:
        yield (
            f"optim.in_backward = true frees the gradients by which AdaLoRA in strategy {recipe.strategy!r} "
            "chooses ranks: set it to false, or take another adapter"
        )


# ------------------------------------------------------------------------------------- policy and strategy


def meta_policy(recipe: Recipe, data: Data) -> Policy:
    """Return the recipe's policy on the meta device.

    Raises as `checkpoints.inspect` does, EmbodimentError if the checkpoint was trained on another robot than
    the data's, and ConfigError for fields that exclude each other.
    """
    spec = recipe.policy
    if not spec.checkpoint:
        if not spec.family:
            raise ConfigError("policy: give either `checkpoint` or `family` (with `size` or `config`)")
        policy = build_family(spec.family, spec.size, spec.config, device="meta")
        train_with_delays(policy, recipe.train.max_delay)
        return policy
    path = checkpoints.place(spec.checkpoint).path
    options = checkpoints.parse_config(spec.config).of_weights()
    base = spec.base or None
    declared = checkpoints.declaration(path, base)
    tells = bool(spec.tokenizer) and declared.tokenizer_tells
    inspected = checkpoints.inspect_all(
        path,
        options or None,
        base=base,
        fresh=spec.fresh,
        resize=spec.resize,
        trust=spec.trust,
        tokenizer=open_named(spec.tokenizer) if tells else None,
    )
    reconcile.agree_on_parts(
        recipe, data, reconcile.codecs_before(recipe, data, inspected.codecs, path), declared
    )
    train_with_delays(inspected.policy, recipe.train.max_delay)
    return inspected.policy


def resumed_policy(recipe: Recipe, checkpoint: Path) -> Policy:
    """Return the policy of a run's own `checkpoint` on the meta device, without adapters.

    Raises as `checkpoints.inspect` does.
    """
    base = recipe.policy.base if checkpoints.read_base(checkpoint) is not None else ""
    trust = (recipe.policy.family, *recipe.policy.trust)
    policy = checkpoints.inspect(checkpoint, base=base or None, trust=trust).policy
    return family(family_name(policy)).build(policy.config, "meta")


def plan_of(recipe: Recipe, strategy: Strategy, policy: Policy, *, held_out: bool) -> Plan:
    """Return the plan of a strategy in the recipe's run; `policy` may be on the meta device.

    `held_out` tells whether there is anything to validate on. Raises StrategyError if the strategy does not
    fit the policy or the run, or a library that it needs is not installed.
    """
    plan = preview(policy, strategy)
    stages.require_reachable(plan, recipe.train, held_out=held_out)
    for method in dict.fromkeys(plan.quantised.values()):
        library = LIBRARIES[method]
        if find_spec(library) is None:
            raise StrategyError(f'quantise = "{method}" needs {library}: pip install "vlafit[quantise]"')
    return plan


# ----------------------------------------------------------------------------------------------- warnings


def run_warnings(recipe: Recipe, plan: Plan, data: Data, processes: int) -> tuple[str, ...]:
    """Return a sentence for each setting, or stage of the strategy, with less effect than it asks for."""
    return (*_few_episodes(recipe, data), *_long_warmups(recipe, plan), *_nothing_to_shard(recipe, processes))


def never_began(plan: Plan, reached: int, steps: int) -> str:
    """Return a sentence about the stages after `reached`, which never began; "" if there are none."""
    names = [stages.title(plan.at(n)) for n in range(reached + 1, len(plan.strategy.stages))]
    if not names:
        return ""
    return (
        f"strategy {plan.strategy.name!r}: training ended after step {steps} in "
        f"{stages.title(plan.at(reached))}, so {'; '.join(names)} never began"
    )


def _few_episodes(recipe: Recipe, data: Data) -> Iterator[str]:
    wanted = recipe.data.episodes_per_task
    if not wanted:
        return
    for store, ids in zip(data.stores, data.training, strict=True):
        counts, trained = dict[str, int](), {*ids}
        for group in groups_of(store):
            chosen = [i for i in group.ids if i in trained]
            names = [store.episodes[store.index(i)].task for i in chosen] if group.alone else [group.name]
            counts |= dict.fromkeys(names, 1 if group.alone else len(chosen))
        few = [f"{task} {count}" for task, count in counts.items() if count < wanted]
        if few:
            more = f" and {len(few) - 3} more tasks" if len(few) > 3 else ""
            yield (
                f"data.episodes_per_task is {wanted}, but dataset {store.card.name!r} has fewer training "
                f"episodes for {len(few)} of its {len(counts)} tasks ({', '.join(few[:3])}{more}): all are "
                "used"
            )


def _long_warmups(recipe: Recipe, plan: Plan) -> Iterator[str]:
    steps, warmup = recipe.train.steps, recipe.optim.warmup_steps
    if warmup >= steps:
        highest = recipe.optim.lr * steps / (warmup + 1)
        yield (
            f"optim.warmup_steps = {warmup} is as long as the run of {steps} steps: the learning rate only "
            f"reaches {highest:.3g}, never optim.lr = {recipe.optim.lr:g}"
        )
    strategy = plan.strategy
    for number, stage in enumerate(strategy.stages[1:], 1):
        began = stage.begin.at_step(steps) if stage.begin else 0
        if began is None:
            continue
        length = stages.length(strategy.stages, steps, Place(number, began))
        if stage.warmup_steps >= length:
            yield (
                f"strategy {strategy.name!r}: the warm-up of {stages.title(plan.at(number))} takes "
                f"{stage.warmup_steps} steps, but the stage only lasts {length}: it never reaches its full "
                "learning rate"
            )


def _nothing_to_shard(recipe: Recipe, processes: int) -> Iterator[str]:
    if recipe.train.shards and processes == 1:
        copies = f" and train.replicas = {recipe.train.replicas}" if recipe.train.replicas > 1 else ""
        effect = "have no effect" if copies else "has no effect"
        named = f"train.sharding = {recipe.train.sharding!r}{copies}"
        yield f"{named} {effect} with one process: nothing is sharded"
