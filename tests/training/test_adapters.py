"""Trained adapters from outside: several on one base, and what is no adapter of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from clusters.errors import RequestError
from orchestrator.spec import load_spec
from qlora_core.training.adapters import check_continues, load_adapters, read_adapter
from qlora_core.training.merge import plan_merge


def fresh(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return cast(torch.Tensor, model.eval()(torch.arange(5, 25).unsqueeze(0)).logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """Two adapters of plain peft, of unlike ranks and targets."""
    folders = {}
    for seed, (name, rank, targets) in enumerate((("red", 4, ["q_proj", "v_proj"]), ("blue", 8, "all-linear"))):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        folders[name] = tmp_path_factory.mktemp(name)
        get_peft_model(fresh(tiny_base), config).save_pretrained(folders[name])
    return folders


def test_each_of_several_adapters_is_what_peft_alone_makes_of_it(tiny_base: Path, trained: dict[str, Path]) -> None:
    model = load_adapters(fresh(tiny_base), trained)
    assert model.active_adapters == ["red"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, folder in trained.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(PeftModel.from_pretrained(fresh(tiny_base), folder))), name


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of an adapter with another config."""
    shutil.copytree(folder, to)
    fields = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return to


def test_what_is_no_adapter_of_this_base_is_told_all_at_once(
    tiny_base: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(trained["red"], tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    wider = {
        name: torch.zeros(value.shape[0], 128) if "lora_A" in name else value.clone() for name, value in weights.items()
    }
    save_file(wider, other / "adapter_model.safetensors")
    pickled = changed(trained["red"], tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    folders = {
        "other": other,
        "pickled": pickled,
        "prefix": changed(trained["red"], tmp_path / "prefix", peft_type="PREFIX_TUNING"),
        "empty": tmp_path,
        "a.b": trained["red"],
    }
    with pytest.raises(RequestError) as caught:
        load_adapters(fresh(tiny_base), folders)
    text = str(caught.value)
    assert "q_proj has 128 inputs, the base model's has 64" in text
    assert "holds no adapter_model.safetensors" in text
    assert "peft_type is 'PREFIX_TUNING'" in text
    assert "holds no adapter_config.json" in text
    assert "--adapter: an adapter's name is letters" in text


def test_an_adapter_that_belongs_to_a_changed_base_is_neither_compared_nor_merged(
    tiny_base: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    begun = changed(trained["red"], tmp_path / "pissa", init_lora_weights="pissa_niter_4")
    with pytest.raises(RequestError, match="began with pissa_niter_4"):
        load_adapters(fresh(tiny_base), {"red": trained["red"], "pissa": begun})
    with pytest.raises(RequestError, match="began with pissa_niter_4"):
        plan_merge(tiny_base, begun)


def test_a_config_that_its_weights_do_not_fit(tiny_base: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    fewer = changed(trained["blue"], tmp_path / "fewer", target_modules=["q_proj"])
    with pytest.raises(RequestError, match="do not fit its own config"):
        load_adapters(fresh(tiny_base), {"fewer": fewer})


def test_the_digest_is_of_weights_and_config(trained: dict[str, Path], tmp_path: Path) -> None:
    red = read_adapter(trained["red"])
    same, other = (changed(trained["red"], tmp_path / str(alpha), lora_alpha=alpha) for alpha in (8, 16))
    assert len({red.digest, read_adapter(trained["blue"]).digest, read_adapter(other).digest}) == 3
    assert read_adapter(same).config == red.config


def test_what_a_recipe_does_not_say_is_the_adapter_s_and_the_rest_must_agree(
    tiny_base: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    text = f"name: more\nmodel: {tiny_base}\nadapter: {trained['blue']}\ndata: {{path: x.jsonl}}\noutput: out\n"
    path.write_text(text)
    spec = load_spec(path)
    assert (spec.recipe.rank, spec.recipe.alpha, spec.adapter) == (8, 8, str(trained["blue"]))
    check_continues(read_adapter(trained["blue"]), tiny_base, spec.recipe)
    with pytest.raises(RequestError, match=r"recipe.rank: the adapter in .* was trained with 8 \(got 16\)"):
        load_spec(path, ["recipe.rank=16"])
    with pytest.raises(RequestError, match=r"recipe.targets: the adapter in .* adapts"):
        check_continues(read_adapter(trained["red"]), tiny_base, dataclasses.replace(spec.recipe, rank=4))
