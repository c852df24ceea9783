"""Whether weight files hold the model of a config: what transformers saves does, by any of its names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from meta_models import on_meta
from test_targets import FIELDS, architecture_of

from qlora_core.huggingface.modules import in_layer, layers_of
from qlora_core.huggingface.stored import Shape, unlike

Shapes = dict[str, Shape | None]


def shapes_of(model: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def said(family: str, shapes: Shapes, **changes: int) -> str:
    return unlike(replace(architecture_of(family), **changes), shapes, shapes.__getitem__)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FIELDS)
def test_a_model_fits_its_own_config_and_no_other(family: str) -> None:
    model, architecture = on_meta(FIELDS[family]), architecture_of(family)
    shapes, prefix = shapes_of(model), f"{model.base_model_prefix}."
    assert said(family, shapes) == ""
    assert said(family, {name.removeprefix(prefix): shape for name, shape in shapes.items()}) == ""
    assert said(family, {named_before_4_52(name): shape for name, shape in shapes.items()}) == ""
    assert said(family, dict.fromkeys(shapes)) == ""  # packed
    assert said(family, {f"other.{name}": (1, 2) for name in shapes}) == ""

    count, period = architecture.num_layers, architecture.period
    for other in (count - period, count + period) if count > period else (count + period,):
        told = f"its files hold {count} layers, and its config.json says {other}"
        assert said(family, shapes, num_layers=other) == told
    for linear in architecture.linears:
        last = f"{in_layer(linear.path, layers_of(architecture, linear)[-1])}.weight"
        (rows, columns) = shapes[last] or ()
        told = said(family, {**shapes, last: (rows + 1, columns)})
        assert f"{last} is [{rows + 1}, {columns}] in its files" in told
        without = {name: shape for name, shape in shapes.items() if name != last}
        assert count == period or said(family, without).startswith("its files ")
    assert "in its files, and by its config.json it is" in said(family, shapes, vocab_size=7)


def named_before_4_52(name: str) -> str:
    """As transformers called it in models that see."""
    named = name.replace("model.language_model.", "language_model.model.")
    return named.replace("model.vision_tower.", "vision_tower.")


def test_layers_that_predict_further_tokens_are_none_of_the_decoder_s() -> None:
    shapes = shapes_of(on_meta(FIELDS["llama-0"]))
    further: Shapes = {f"mtp.layers.{number}.self_attn.q_proj.weight": (1, 2) for number in range(9)}
    assert said("llama-0", {**shapes, **further}) == ""
