"""An actor whose matrices are kept in 8 bits: what it changes is measured, named and part of its identity."""

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_actor import inputs, make_actor
from vlafit import shipped
from vlafit.actor import PolicyActor, load_actor
from vlafit.errors import ConfigError, StrategyError
from vlafit.inference import accelerated
from vlafit.policies import build_family
from vlafit.tuning import apply, load_strategy
from vlafit.tuning.inject import compute_adapters_in_bf16
from vlafit.tuning.quantise import dequantised, quantise_layer, quantised_names, stored_bytes
from vlafit.tuning.weights_8bit import EIGHT_BITS, EightBits, quantise_weights

pytest.importorskip("torchao")

OTHERS = {"smolvla": "smolvla-tiny", "act": "act-tiny", "xvla": "xvla-tiny", "groot": "groot-tiny"}


@pytest.fixture(scope="module", params=EIGHT_BITS)
def how(request: pytest.FixtureRequest) -> EightBits:
    return request.param


@pytest.fixture(scope="module")
def actor(how: EightBits) -> PolicyActor:
    plain = make_actor()
    accelerated(plain.policy, quantise=how)
    return PolicyActor(plain.policy, plain.codec, width=8, identity="checkpoint 12")


def test_matrices_of_attention_and_mlps_take_a_quarter_of_float32(actor: PolicyActor) -> None:
    kept = dict(actor.policy.named_parameters())
    layers = [
        info.name.removesuffix(".weight")
        for info in actor.policy.parts()
        if info.kind in ("attention", "mlp") and info.name.endswith(".weight")
    ]
    quantised = quantised_names(actor.policy)
    assert quantised == {name for name in layers if isinstance(actor.policy.get_submodule(name), nn.Linear)}
    assert not any(name.startswith(("action_", "state_", "projector")) for name in quantised)
    for name in quantised:
        weight = kept[f"{name}.weight"]
        rows = weight.shape[0]
        assert stored_bytes(weight) <= weight.numel() + rows * 8  # a scale, and a zero point, for each row


def test_no_weight_moves_further_than_its_rounding(how: EightBits) -> None:
    policy = make_actor().policy
    before = {name: value.detach().clone() for name, value in policy.state_dict().items()}
    quantise_weights(policy, how)
    for name in quantised_names(policy):
        weight, kept = before[f"{name}.weight"], dequantised(policy.get_submodule(name))
        assert kept is not None
        assert ((kept - weight).abs() <= most(weight, how)).all()


def most(weight: torch.Tensor, how: EightBits) -> torch.Tensor:
    """Return how far each weight may move: half a step, and the scale's own rounding in float32."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    # int8: steps of 1/127. fp8: of the last of 3 bits, and of the smallest numbers 2^-9 of 448.
    half = largest / 254 if how == "int8" else torch.maximum(weight.abs() / 16, largest * 2**-10 / 448)
    return half + 1e-6 * largest


def test_actions_differ_by_what_was_measured_and_stated(
    how: EightBits, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_actor()
    expected = plain.act(*inputs(4, 8))
    with caplog.at_level(logging.WARNING):
        accelerated(plain.policy, quantise=how)
    (stated,) = [float(line.split("by ")[1].split(" %")[0]) for line in caplog.messages if how in line]
    # An int8 weight moves by at most 1/254 of its row's largest, an fp8 weight by 1/16 of itself.
    assert 0 < stated < {"int8": 1, "fp8": 100 / 16}[how]
    chunks = plain.act(*inputs(4, 8))
    for one, other in zip(expected, chunks, strict=True):
        difference = abs(one.actions - other.actions).max()
        assert 0 < difference < {"int8": 0.05, "fp8": 0.25}[how] * abs(one.actions).max()


def test_a_chunk_does_not_depend_on_what_else_is_asked(actor: PolicyActor) -> None:
    observations, keys = inputs(5, 8)
    together = actor.act(observations, keys)
    for observation, key, chunk in zip(observations, keys, together, strict=True):
        assert actor.act([observation], [key])[0].actions.tobytes() == chunk.actions.tobytes()


def test_it_is_part_of_the_identity_of_an_evaluation(actor: PolicyActor, how: EightBits) -> None:
    assert actor.fingerprint() == f"checkpoint 12 steps=3 weights={how} width=8 seed=0 device=cpu"


def test_adapters_are_merged_first(how: EightBits) -> None:
    policy = make_actor().policy
    apply(policy, load_strategy("lora"))
    compute_adapters_in_bf16(policy)
    accelerated(policy, quantise=how)
    assert quantised_names(policy) and not any("lora" in name for name, _ in policy.named_parameters())


def test_a_shipped_checkpoint_opens_with_it(how: EightBits) -> None:
    loaded = load_actor(shipped.find("checkpoint", "metaworld-base"), width=1, quantise=how)
    assert f" weights={how} " in loaded.fingerprint()
    assert quantised_names(loaded.policy)


def test_what_was_not_tried_is_refused(actor: PolicyActor, how: EightBits) -> None:
    with pytest.raises(ConfigError, match=f"'{how}': .* quantised already"):
        accelerated(actor.policy, quantise=how)
    with pytest.raises(ConfigError, match=f"'{how}' was not tried with compile"):
        accelerated(make_actor().policy, compile=True, quantise=how)
    with pytest.raises(ConfigError, match="quantise 'fp4': must be 'int8' or 'fp8'"):
        accelerated(make_actor().policy, quantise="fp4")


def test_the_random_numbers_and_the_precision_of_the_caller_are_left_alone(how: EightBits) -> None:
    state, precision = torch.random.get_rng_state(), torch.get_float32_matmul_precision()
    tuned = torch._inductor.config.coordinate_descent_tuning  # what torchao sets by default
    accelerated(make_actor().policy, quantise=how)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    assert torch._inductor.config.coordinate_descent_tuning == tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_stays_zeros(how: EightBits, dtype: torch.dtype) -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(16, 4, dtype=dtype)})
    with torch.no_grad():
        holder["layer"].weight[1] = 0
        holder["layer"].weight[2] = 1e-39  # smaller than the smallest normal number
    quantise_layer(holder, "layer", how)
    kept = dequantised(holder["layer"])
    assert kept is not None and kept.isfinite().all()
    assert not kept[1].any()


def test_layers_without_numbers_are_quantised_by_the_same_code(how: EightBits) -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(16, 4, device="meta")})
    quantise_layer(holder, "layer", how)
    layer = holder["layer"]
    assert layer(torch.zeros(2, 16, device="meta")).shape == (2, 4)
    assert quantised_names(holder) == {"layer"} and layer.weight.device.type == "meta"


class _WithoutFloat8(TorchDispatchMode):
    """Refuses float8 as torch does on a Mac's GPU, which is not at hand."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (kwargs or {}).get("dtype") == torch.float8_e4m3fn:
            raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support")
        return func(*args, **(kwargs or {}))


def test_a_device_without_float8_is_named_and_the_layer_is_left_as_it_was() -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(16, 4)})
    said = r'"fp8" cannot be used on cpu \(Trying.*"int8"'
    with _WithoutFloat8(), pytest.raises(StrategyError, match=said):
        quantise_layer(holder, "layer", "fp8")
    assert not quantised_names(holder)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_measured_too(family: str, how: EightBits) -> None:
    policy = build_family(family, OTHERS[family], {}, torch.Generator().manual_seed(0))
    assert 0 < quantise_weights(policy, how) < 0.1
    assert quantised_names(policy)


def test_a_policy_that_answers_with_tokens_is_refused(how: EightBits) -> None:
    policy = build_family("pi0_fast", "pi0-fast-tiny", {}, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="Pi0Fast answers with tokens"):
        accelerated(policy, quantise=how)
    assert not quantised_names(policy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_rounds_and_computes_as_the_cpu_does(how: EightBits, dtype: torch.dtype) -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(64, 8, dtype=dtype, device="cuda")})
    weight = holder["layer"].weight.detach().float()
    quantise_layer(holder, "layer", how)
    kept = dequantised(holder["layer"])
    assert kept is not None
    rounding = torch.finfo(dtype).eps * weight.abs().amax(dim=1, keepdim=True)
    assert ((kept.float() - weight).abs() <= most(weight, how) + rounding).all()
    x = torch.randn(3, 64, dtype=dtype, device="cuda")
    assert torch.allclose(holder["layer"](x), nn.functional.linear(x, kept, holder["layer"].bias), atol=0.05)
