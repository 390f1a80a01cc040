"""Validation on held-out episodes, with random numbers fixed once for the whole run.

The same samples and draws at every step make two validation losses of one run, or of two runs, comparable.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlafit.codec import CodecSet
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy, mean_loss
from vlafit.nn.rng import VALIDATION, Keys, SampleRng, sample_rng
from vlafit.recipe import TrainRecipe
from vlafit.train.distributed import gathered_anew, sum_over_processes
from vlafit.train.feature_cache import FeatureCache


@torch.no_grad()
def validate(
    policy: Policy,
    batches: Sequence[tuple[Keys, Batch]],
    recipe: TrainRecipe,
    device: torch.device,
    codecs: CodecSet,
    name: str = "",
    cache: FeatureCache | None = None,
) -> dict[str, float]:
    """Return `validation/loss` and `validation/action_error` over all processes' batches.

    Those of a named validation set are `validation/NAME/loss` and `validation/NAME/action_error`. A loss of
    several terms is followed by the mean of each, `validation/loss_TERM`.

    The action error is the mean absolute difference, in normalised units over real steps and dimensions,
    between the demonstrated chunk and the one that the policy answers with. Of a policy that answers with
    tokens, `validation/valid_actions` is the share of answers that are a chunk; the others count as the codec
    would execute them. What else the policy `measures` is there under its name. A set of questions about
    images has neither actions nor their error. `cache` is that of the training.
    """
    policy.eval()
    terms = policy.terms()
    sums = torch.zeros(2 * len(terms) + 4, dtype=torch.float64, device=device)
    names, sees_missing = policy.measured(), policy.needs().sees_missing
    further = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for keys, batch in batches:
        counts = policy.counts(batch, draws=1)
        trimmed = batch.trim(sees_missing=sees_missing)
        acts = batch.action_mask is not None and bool(batch.action_mask.any())  # else they are questions
        batch = (trimmed if cache is None else cache.attach(batch, trimmed)).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
        with autocast, gathered_anew(policy, recipe.sharding):
            out = policy(batch, _rng(keys))
            sampling = _rng(keys)
            sampling.uniform()  # so that flow policies sample from the noise of their loss
            sampled = policy.act(batch, sampling) if acts else None
            measures = policy.measures(batch)
        for row, (total, count) in zip(further, measures, strict=True):
            row += torch.stack([total.double(), row.new_tensor(count)])
        sums[: len(terms)] += torch.stack([out[name] for name in terms])
        if sampled is not None:
            sums[-4:] += _compared(batch, sampled, codecs)
        sums[len(terms) : -4] += torch.tensor(
            [counts[name] for name in terms], dtype=sums.dtype, device=device
        )
    policy.train()
    *values, error, compared, valid_rows, rows = sum_over_processes(sums).tolist()
    totals = dict(zip(terms, values[: len(terms)], strict=True))
    counts = dict(zip(terms, values[len(terms) :], strict=True))
    if not any(counts.values()):
        return {}
    prefix = f"validation/{name}/" if name else "validation/"
    metrics = {f"{prefix}loss": mean_loss(terms, totals, counts)}
    metrics |= {f"{prefix}action_error": error / compared} if compared else {}
    if policy.needs().writes_tokens and rows:
        metrics[f"{prefix}valid_actions"] = valid_rows / rows
    for figure, (total, count) in zip(names, sum_over_processes(further).tolist(), strict=True):
        metrics |= {f"{prefix}{figure}": total / count} if count else {}
    if len(terms) > 1:
        metrics |= {f"{prefix}loss_{term}": totals[term] / counts[term] for term in terms if counts[term]}
    return metrics


def _compared(batch: Batch, sampled: Tensor, codecs: CodecSet) -> Tensor:
    """Return the summed error of sampled actions, what it counts, the answers that are a chunk, and rows."""
    assert batch.actions is not None and batch.action_mask is not None
    device, valid = sampled.device, sampled.new_ones(len(batch), dtype=torch.bool)
    if not sampled.is_floating_point():
        ids = None if batch.embodiment_id is None else batch.embodiment_id.cpu().numpy()
        actions, decoded = codecs.detokenise(sampled.cpu().numpy(), ids)
        sampled, valid = torch.from_numpy(actions).to(device), torch.from_numpy(decoded)
    error = ((sampled.float() - batch.actions).abs() * batch.action_mask).sum()
    rows = valid.new_tensor(len(batch), dtype=torch.int64, device=device)
    return torch.stack([error, batch.action_mask.sum(), valid.sum().to(device), rows])


def _rng(keys: Keys) -> SampleRng:
    return sample_rng(
        keys, seed=0, stream=VALIDATION
    )  # not the recipe's seed: runs of different seeds compare
