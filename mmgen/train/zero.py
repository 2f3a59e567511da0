"""DeepSpeed's ZeRO with the interface of the engine; only this file uses names of DeepSpeed that are not public.

Where DeepSpeed 0.19 holds the state: stage 0 steps the parameters themselves. Stages 1 and 2 hold one flat fp32 shard
per parameter group, and `_hp_mapping` of each parameter gives the offset of its elements in the shard. Stage 3 cuts
every parameter into equal parts, and `grad_position` gives the offset of this rank's part in the flat shard of its
sub-group.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from mmgen.backbone import build_backbone, load_pretrained
from mmgen.config import Config
from mmgen.model import Losses, MMGenConfig, MMGenModel, build_model
from mmgen.sequence.batch import Batch
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.engine import Engine, Fragment, can_compile
from mmgen.train.optimizer import build_optimizer

BUCKET = 50_000_000
"""Elements per message; DeepSpeed allocates buffers of this size."""
Json = dict[str, Any]
"""A JSON object of DeepSpeed's configuration."""


def deepspeed_config(config: Config, world: int, bf16: bool) -> Json:
    """DeepSpeed's configuration for a run; `train.deepspeed` is merged over it.

    Raises:
        ValueError: the stage or the machine does not support the offloading that is set.
    """
    settings = config.train
    stage = settings.zero_stage
    devices = {"offload_optimizer": settings.offload_optimizer, "offload_weights": settings.offload_weights}
    for name, device in devices.items():
        least = 3 if device == "nvme" or name == "offload_weights" else 1
        if device != "none" and stage < least:
            raise ValueError(f"train.{name} {device} needs train.zero_stage {least} or more (it is {stage})")
        if device == "nvme" and not torch.cuda.is_available():
            raise ValueError(
                f"train.{name} nvme compiles an extension of DeepSpeed, which needs a GPU: use cpu or none"
            )
        if device == "nvme" and settings.nvme_path is None:
            raise ValueError(f"train.{name} nvme needs train.nvme_path, a folder on the disk")
    share = -(-settings.batch_rows // world)
    rows = min(settings.micro_rows or share, share)
    zero: Json = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_weights", "offload_param")):
        if devices[name] != "none":
            zero[key] = {"device": devices[name], "pin_memory": torch.cuda.is_available()}
            if devices[name] == "nvme":
                zero[key]["nvme_path"] = str(settings.nvme_path)
    ours: Json = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": -(-settings.batch_rows // (world * rows)),
        "gradient_clipping": settings.clip_norm if stage else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without it, stage 1 also keeps gradients in bf16, and adds those of earlier micro-steps a second time.
        "bf16": {"enabled": bf16 and stage > 0, "immediate_grad_update": True},
        "zero_optimization": zero,
    }
    if bf16 and stage:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    result: Json = merged(ours, settings.deepspeed)
    return result


def merged(ours: Any, theirs: Any) -> Any:
    """Merge two nested mappings; values of the second replace those of the first."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return theirs
    return {**ours, **{key: merged(ours.get(key), value) for key, value in theirs.items()}}


class ZeroEngine(Engine):
    """ZeRO stages 0 to 3. In bf16, stages 1 to 3 hold bf16 weights and fp32 master weights; stage 0 uses autocast."""

    def _build(self, vocabulary: int) -> None:
        self.stage = self.config.train.zero_stage
        self._settings = deepspeed_config(self.config, self.ranks.world, self.bf16)
        accelerator = Accelerator(
            mixed_precision="bf16" if self.bf16 and self.stage else "no",
            gradient_accumulation_steps=self._settings["gradient_accumulation_steps"],
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=copy.deepcopy(self._settings), zero3_init_flag=False),
            # Without a backend, accelerate treats each process on a CPU as a run of one process.
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")],
        )
        # Without it, transformers would shard the model too, and initialise it on rank 0 only.
        unset_hf_deepspeed_config()
        if accelerator.num_processes != self.ranks.world:
            raise RuntimeError(
                f"{self.ranks.world} processes were started, but accelerate finds {accelerator.num_processes}"
            )
        self.device = accelerator.device
        low = torch.bfloat16 if self.bf16 and self.stage else torch.float32
        if self.stage == 3:
            model = self._construct(vocabulary)
        else:
            model = build_model(self.config, vocabulary, self.autoencoder)
        exact: dict[str, Tensor] = {}
        if low is torch.bfloat16:  # DeepSpeed makes the master weights from rounded weights; these are the exact ones
            exact = {name: getattr(p, "ds_tensor", p).detach() for name, p in model.named_parameters()}
        if self.stage == 3:
            for p in model.parameters():
                p.data, p.ds_tensor.data = p.data.to(low), p.ds_tensor.data.to(low)
        self.model = self._checkpointed(model)
        self._zero_types()
        self.optimizer = build_optimizer(model, self.config.train)
        with redirect_stdout(io.StringIO()):  # DeepSpeed's bf16 optimiser prints memory statistics at any log level
            self._engine, *_ = accelerator.prepare(model, self.optimizer)
        self._zero: Any = self._engine.optimizer
        if self.config.train.compile and can_compile(self.device) and self.stage < 3:
            model.compile_backbone()
        if exact:
            for fragment in self._fragments():
                source = exact[fragment.name].view(-1)
                start = 0 if self.stage == 3 else fragment.start
                fragment.of(fragment.flat).copy_(source[start : start + fragment.numel])
            self.refresh()
        self._taken, self._permitted = False, True

    def _construct(self, vocabulary: int) -> MMGenModel:
        """Build a model whose layers are sharded as soon as each is built; its weights equal those of `build_model`."""
        settings = merged(copy.deepcopy(self._settings), {"bf16": {"enabled": False}})
        with deepspeed.zero.Init(config_dict_or_path=settings), _gathered_initialisation():
            model = MMGenModel(MMGenConfig.of(self.config, vocabulary, self.autoencoder))
        name = self.config.model.backbone.pretrained
        if name is not None:
            whole = build_backbone(model.config.backbone)
            load_pretrained(whole, name, vocabulary, Tokenizer.of(self.config).added)
            for p, q in zip(model.backbone.parameters(), whole.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                    p.copy_(q)
        return model

    def _zero_types(self) -> None:
        """Turn on autocast inside the forward pass of the module, because DeepSpeed turns off one around it."""
        if self.bf16:
            forward = torch.autocast(self.device.type, torch.bfloat16)(self.model.forward)
            setattr(self.model, "forward", forward)  # noqa: B010 - mypy refuses to assign to a method

    @contextmanager
    def _sampling_types(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 and self.stage else nullcontext():
            yield

    def _fragments(self) -> list[Fragment]:
        named = list(self.model.named_parameters())
        rank, world = self.ranks.rank, self.ranks.world
        if self.stage == 0:
            return [Fragment(n, 0, p.numel(), p, 0, i % world == rank) for i, (n, p) in enumerate(named)]
        fragments = []
        for i, (name, p) in enumerate(named):
            if self.stage == 3:
                share = p.ds_tensor.numel()
                start = rank * share
                numel = min(share, p.ds_numel - start)
                if not p.requires_grad:
                    flat, at = p.ds_tensor, 0
                else:
                    group, at, _ = self._zero.grad_position[self._zero.get_param_id(p)]
                    flat = self._zero.fp32_partitioned_groups_flat[group]
                if numel > 0:
                    fragments.append(Fragment(name, start, numel, flat, at))
            elif not p.requires_grad:
                fragments.append(Fragment(name, 0, p.numel(), p, 0, i % world == rank))
            elif p._hp_mapping is not None:
                mapping = p._hp_mapping
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(
                    Fragment(name, low.start, high.numel, self._flats[mapping.param_group_index], high.start)
                )
        return fragments

    @property
    def _flats(self) -> list[Tensor]:
        """Flat fp32 shards of stages 1 and 2; in stage 1 with bf16, another optimiser class of DeepSpeed holds them."""
        zero = self._zero
        flats: list[Tensor] = (
            zero.single_partition_of_fp32_groups
            if hasattr(zero, "single_partition_of_fp32_groups")
            else zero.fp32_groups_flat_partition
        )
        return flats

    def _stepped(self, flat: Tensor) -> bool:
        return flat.requires_grad or any(flat is f for f in getattr(self._zero, "fp32_partitioned_groups_flat", []))

    def forward(self, batch: Batch) -> Losses:
        losses: Losses = self._engine(batch)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, allow: bool) -> tuple[float, bool]:
        self._permitted, self._taken = allow, False
        self._norm = math.inf
        self._engine.step()
        norm = self._norm if self.stage == 0 else float(self._engine.get_global_grad_norm())
        return norm, self._taken

    def _allow(self, stepped: list[Tensor]) -> bool:
        # Stages 1 to 3 have clipped before this call, and after some overflows they do not call this at all.
        if self.stage == 0:
            self._norm = float(torch.nn.utils.clip_grad_norm_(stepped, self.config.train.clip_norm))
        else:
            self._norm = float(self._zero._global_grad_norm)
        self._taken = self._permitted and math.isfinite(self._norm) and super()._allow(stepped)
        return self._taken

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        self._release()
        self.optimizer.swap(average)
        self.refresh()
        try:
            with self._sampling_types():
                yield
        finally:
            self._release()
            self.optimizer.swap(average)
            self.refresh()

    def _release(self) -> None:
        if self.stage == 3:
            self._engine.empty_partition_cache()

    def refresh(self) -> None:
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def close(self) -> None:
        self._engine.destroy()


@contextmanager
def _gathered_initialisation() -> Iterator[None]:
    """Inside `zero.Init`, transformers initialises gathered weights, with the same random numbers on every rank."""
    original = PreTrainedModel._initialize_weights

    def initialise(self: PreTrainedModel, module: torch.nn.Module, *args: Any) -> None:
        weights = [
            *module.parameters(recurse=False),
            *(p for c in module.children() for p in c.parameters(recurse=False)),
        ]
        with deepspeed.zero.GatheredParameters(weights, modifier_rank=0) if weights else nullcontext():
            original(self, module, *args)

    PreTrainedModel._initialize_weights = initialise
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original
