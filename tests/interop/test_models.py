"""Whole models of other packages: exported, folded and traced. Run by `make interop`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

import fxparam
from fxparam.graph.analysis.evaluations import evaluations

transformers: Any = pytest.importorskip("transformers")
layers: Any = pytest.importorskip("orthogonium.layers")

pytestmark = pytest.mark.filterwarnings("ignore::")


class Encoder(nn.Module):
    """wav2vec 2.0, whose positional convolution has weight norm."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            attn_implementation="eager",
        )
        self.model = transformers.Wav2Vec2Model(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


def vocoder() -> nn.Module:
    """HiFi-GAN, all of whose convolutions have weight norm."""
    config = transformers.SpeechT5HifiGanConfig(
        upsample_initial_channel=16,
        model_in_dim=8,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    model = transformers.SpeechT5HifiGan(config)
    model.apply_weight_norm()
    return model


def classifier() -> nn.Module:
    """Orthogonal layers, with a spectral norm that iterates at each evaluation, in eval() too."""
    convolution = layers.AdaptiveOrthoConv2d(4, 8, 3, padding=1, padding_mode="circular")
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), layers.OrthoLinear(8 * 36, 5))


MODELS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (Encoder, (1, 1600)),
    (vocoder, (1, 20, 8)),
    (classifier, (2, 4, 6, 6)),
]


def _parametrized(model: nn.Module) -> list[str]:
    """Tensors; those of parametrizations that are parametrized themselves belong to them."""
    lists = [n for n, m in model.named_modules() if isinstance(m, ParametrizationList)]
    outermost = [name for name in lists if name.count("parametrizations.") == 1]
    return [name.replace("parametrizations.", "") for name in outermost]


def _evaluated(graph: torch.fx.Graph) -> list[str]:
    return [evaluation.name for evaluation in evaluations(graph)]


@torch.no_grad()
@pytest.mark.parametrize(("make", "shape"), MODELS, ids=["wav2vec2", "hifigan", "orthogonium"])
def test_exported_and_traced(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    assert _parametrized(model)
    expected = copy.deepcopy(model)(x)

    def close(actual: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    program = fxparam.export(model, (x,))
    assert not fxparam.hoist(program.graph_module).modified
    close(copy.deepcopy(program).module()(x))
    assert sorted(_evaluated(program.graph)) == sorted(_parametrized(model))
    if make is classifier:
        with pytest.raises(ValueError, match=r"0\.weight"):
            fxparam.fold(program)
        # Nor is it traced: its iteration calls set_() on a parameter, which Dynamo refuses.
    else:
        folded = fxparam.fold(program)
        close(folded.module()(x))
        assert not _evaluated(folded.graph)
        assert not [name for name in folded.state_dict if "parametrizations" in name]
        assert len(folded.graph.nodes) < len(program.graph.nodes)
        twin = copy.deepcopy(model)
        gm = fxparam.symbolic_trace(twin, example_inputs=(x,))
        assert list(gm.state_dict()) == list(twin.state_dict())
        close(gm(x))
        assert sorted(_evaluated(gm.graph)) == sorted(_parametrized(model))
