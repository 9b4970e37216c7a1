"""An edit that leaves the trace: an ordinary checkpoint with a model card, or one vector for each layer.

Every edit here touches the input of an MLP's last map W or adds a constant to the residual stream, so it is a change of
weights: `scale` multiplies rows of W (the value vectors); `shift` by s adds the constant s W to the map's output, which
is a bias; `clamp` to c sets rows to 0 and adds the bias c W; scaled keys are scaled rows of the map before.
"""

import copy
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lib import artifacts, chain, checkpoints
from lib.errors import UserError
from lib.families import family_of, mlp_out, n_layers
from lib.interventions import Edit
from lib.offsets import offsets
from lib.protocol import Protocol

VECTORS = {".gguf", ".safetensors"}  # a file of one vector a layer; any other name is a checkpoint's folder
ADDED = {"shift", "steer"}  # kinds that add a constant
WITH_BIAS = {"clamp", *ADDED}  # kinds that need a bias in a checkpoint
OF_POST = {"keys", "keys and bias", "values"}  # kinds that edit the model after DPO; so does a condition `dpo - ...`
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Export:
    """What --export asks for: where, and the condition `(name, kind)`."""

    path: Path
    condition: tuple[str, str]

    @property
    def is_vector(self) -> bool:
        """Whether a file of vectors is asked for."""
        return self.path.suffix in VECTORS


def asked(options: dict, conditions: list[tuple[str, str]], protocol: Protocol) -> Export | None:
    """--export and --export-condition, checked before any work; None: nothing is exported.

    conditions: (name, kind) of all that the run measures and that can be exported.

    Raises:
        UserError: no such condition, the place is taken or too small, or the edit is no change of this model's weights.
    """
    if not options["export"]:
        if options["export_condition"]:
            raise UserError(f"--export-condition {options['export_condition']}: give --export FOLDER too.")
        return None
    known = [", ".join(condition) for condition in conditions]
    if options["export_condition"] not in known:
        given = options["export_condition"] or ""
        raise UserError(f'--export-condition "{given:.60}": give one of: {"; ".join(known):.300}')
    export = Export(artifacts.resolved(Path(options["export"])), conditions[known.index(options["export_condition"])])
    if export.path.exists():
        raise UserError(f"--export {export.path}: exists; choose another place.")
    if options["remote"]:
        raise UserError("--export: writes the model's weights, which are on the server; run without --remote.")
    artifacts.check_place(export.path, "--export")
    name, kind = export.condition
    if protocol.edit_positions != "all" and kind in WITH_BIAS | {"scale"}:
        raise UserError(
            f"--export: {name}, {kind} edits the last position alone in this protocol, which no change of weights does;"
            " use --protocol sound, where every position is edited."
        )
    check_possible(export, kind, Path(chain.base_source(options).path), options["model"], protocol)
    of_post = kind in OF_POST or name.startswith("dpo - ")
    edited = options["post"] if of_post else chain.base_source(options).path
    if edited and any(Path(edited).glob(f"*.{checkpoints.ADDED_BIASES}*.safetensors")):
        raise UserError(
            f"--export: {Path(edited).name} has biases that `python -m dpo --trainable biases` added, and transformers "
            "has no place for them in this architecture; its edits cannot be exported."
        )
    return export


def check_possible(export: Export, kind: str, folder: Path, name: str, protocol: Protocol) -> None:
    """Raise UserError where a model has no place for an edit of a kind, or a disk none for the model."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    normed = family_of(model).post_norm is not None and not (kind == "steer" and protocol.steer_at == "residual")
    if export.is_vector:
        if kind not in ADDED:
            raise UserError(f"--export {export.path.name}: {kind} adds no constant; give a folder, for a checkpoint.")
        if normed:
            raise UserError(
                f"--export {export.path.name}: {name} has a norm after each MLP, so {kind} adds no constant to the "
                "residual stream; of kind scale a checkpoint is possible."
            )
        if export.path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
            raise UserError(f"--export {export.path.name}: needs gguf (pip install gguf); FILE.safetensors does not.")
        return
    if kind in WITH_BIAS and (family_of(model).post_norm or not has_place(model)):
        vector = "" if normed or kind == "clamp" else ", and FILE.gguf or FILE.safetensors takes this edit's vectors"
        raise UserError(
            f"--export: {kind} needs a bias in each MLP's last map, and {name} ({config.model_type}) has no place for "
            f"one in transformers; kinds that scale weights are possible{vector}."
        )
    size = FLOAT32_BYTES * sum(parameter.numel() for parameter in model.parameters())
    parent = next(parent for parent in export.path.parents if parent.exists())
    artifacts.check_free(parent, size, f"--export {export.path}: {parent}", "it", "choose another disk")


def has_place(model) -> bool:
    """Whether transformers reads a bias of the MLP's last map in this architecture. `model`: torch or nnsight."""
    return mlp_out(model, 0).bias is not None or hasattr(model.config, "mlp_bias")


def added(model, edit: Any) -> torch.Tensor:
    """The constant that an edit adds to each layer's MLP output, or after the layer: `[n_layers, d_model]` float64.

    edit: of neurons, of kind shift, clamp or scale (what it adds beside a scaling), or a script's own with `added`.
    """
    if not isinstance(edit, Edit):
        return edit.added(n_layers(model)).cpu().double()
    if edit.kind in ("shift", "clamp"):
        return offsets(model, [edit])[0]
    return torch.zeros(n_layers(model), model.config.hidden_size, dtype=torch.float64)


def edited_weights(model, edit: Any) -> dict[str, torch.Tensor]:
    """All weights of a model with an edit in them, by their names in its state dictionary; on the CPU.

    Only what the edit changes is copied. A bias that the model does not have is under its name all the same.
    """
    module, family = model._module, family_of(model)
    weights = {name: weight.detach().cpu() for name, weight in module.state_dict().items()}
    if isinstance(edit, Edit):
        for layer, index, value in edit:
            prefix = f"{family.layers}.{layer}."
            index, value = index.cpu(), value.cpu()
            if edit.kind in ("keys", "keys and bias"):
                scale_(weights, prefix + family.key + ".weight", index, value, rows=not family.transposed)
                if edit.kind == "keys and bias":
                    scale_(weights, prefix + family.key + ".bias", index, value, rows=True)
            elif edit.kind != "shift":
                factor = torch.zeros_like(value) if edit.kind == "clamp" else value
                scale_(weights, prefix + family.mlp_out + ".weight", index, factor, rows=family.transposed)
    for layer, constant in enumerate(added(model, edit)):
        if constant.any():
            name = f"{family.layers}.{layer}.{family.mlp_out}.bias"
            own = weights[name].double() if name in weights else 0
            weights[name] = (own + constant).to(module.dtype)
    return weights


def scale_(weights: dict, name: str, index: torch.Tensor, factor: torch.Tensor, rows: bool) -> None:
    """Multiply rows (or columns) of a weight by a factor each, in a copy that takes its place."""
    weight = weights[name].clone()
    place = index if rows else (slice(None), index)
    by_row = factor[:, None] if rows and weight.dim() == 2 else factor
    weight[place] = (by_row.double() * weight[place].double()).to(weight)
    weights[name] = weight


def save_checkpoint(model, edit: Any, folder: Path) -> None:
    """Write a model with an edit in its weights, as transformers writes one."""
    module, weights = model._module, edited_weights(model, edit)
    config = copy.deepcopy(module.config)
    if hasattr(config, "mlp_bias"):
        ending = f".{family_of(model).mlp_out}.bias"
        config.mlp_bias = config.mlp_bias or any(name.endswith(ending) for name in weights)
    with torch.device("meta"):
        plain = type(module)(config)
    for name, parameter in plain.state_dict().items():
        if name not in weights:  # biases of the MLP's other maps, which Llama's configuration switches on together
            weights[name] = torch.zeros(parameter.shape, dtype=module.dtype)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = module.generation_config
    plain.save_pretrained(folder)


def save_vectors(model, edit: Any, file: Path, model_type: str) -> None:
    """Write an edit's vectors: safetensors with `vectors` `[n_layers, d_model]` float32, or a control vector as GGUF.

    The GGUF is as llama.cpp and repeng read it: `direction.L` is added after layer L. Layers without one are left out.
    """
    vectors = added(model, edit).float()
    if file.suffix == ".safetensors":
        save_file({"vectors": vectors}, file)
        return
    import gguf  # of the extra `embedded`: not everyone has it

    writer = gguf.GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in enumerate(vectors):
        if vector.any():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def placed(export: Export) -> Iterator[Path]:
    """Context that gives a place beside the export's, and puts what stands there in the export's when all is written.

    Raises UserError: the disk is full. Nothing is left behind then, nor when it is interrupted.
    """
    parent = export.path.parent
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    with artifacts.writing(export.path):
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{export.path.name}.", dir=parent))
        try:
            place = work / export.path.name
            if not export.is_vector:
                place.mkdir()
            yield place
            place.rename(export.path)
            new = []
        finally:
            shutil.rmtree(work, ignore_errors=True)
            for folder in new:
                folder.rmdir()


def save_tokenizer(source, folder: Path) -> None:
    """Write the base model's tokenizer, chat template included. source: `lib.models.Source`."""
    checkpoints.read_tokenizer(source).save_pretrained(folder)
