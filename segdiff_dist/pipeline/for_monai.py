"""A model as a torch module for MONAI: label masks in, images out. configs/inference.json of a bundle names it.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data_shards.problems import problem, refuse
from segdiff_dist.pipeline.model import SegGuidedPipeline, problems_with_seed


class MaskToImage(nn.Module):
    """The whole sampling as one forward pass. Its state_dict has the names of models/model.pt."""

    def __init__(
        self,
        bundle: str | Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["bf16", "fp32"] = "fp32",
    ) -> None:
        """`bundle`: the folder. Raises InputProblems."""
        super().__init__()
        self._made = SegGuidedPipeline.from_pretrained(bundle, device, precision)
        for name, part in self._made.model.named_children():
            self.add_module(name, part)

    def forward(self, mask_B1HW: Tensor, modality: str | None = None, *, axis: str = "axial", seed: int = 0) -> Tensor:
        """float32 [B, 1, H, W] from 0 to 1, of label ids in any dtype, which are rounded. `modality` None: the model's
        first. Image b has the noise of (seed, b). Raises InputProblems."""
        made = self._made
        if mask_B1HW.ndim != 4 or mask_B1HW.shape[1] != 1:
            raise problem("bundle", "mask", f"shape {tuple(mask_B1HW.shape)}", "give [B, 1, H, W]")
        refuse(problems_with_seed("seed", seed))
        at = next(self.parameters()).device
        if at.type != made.device.type:
            raise problem(
                "bundle", "device", f"moved to {at}", f"load it there: MaskToImage(bundle, device={at.type!r})"
            )
        chosen = made.model.trained_on[0] if modality is None else modality
        if mask_B1HW.is_complex():
            raise problem("bundle", "mask", f"dtype {mask_B1HW.dtype}", "give label ids as real numbers")
        mask_BHW = mask_B1HW[:, 0]
        ids_BHW = (mask_BHW.round() if mask_BHW.is_floating_point() else mask_BHW).to(torch.int64).cpu().numpy()
        checked_BHW, _ = made.checked(ids_BHW, chosen, axis)
        grey_BHW = made.generate(checked_BHW, list(range(len(checked_BHW))), chosen, axis, seed)
        return torch.from_numpy(grey_BHW)[:, None].to(mask_B1HW.device).float() / 255
