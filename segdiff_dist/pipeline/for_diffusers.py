"""The pipeline's folder as a DiffusionPipeline. FOLDER/pipeline.py imports the class, and diffusers runs that file.

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)(mask, modality="MR").images[0]

Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Generator

from data_shards.problems import problem, refuse
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.samplers import num_evaluations
from segdiff_dist.pipeline.description import DESCRIPTION, UNET
from segdiff_dist.pipeline.folder import save_again
from segdiff_dist.pipeline.model import SegGuidedPipeline, problems_with_seed
from segdiff_dist.sampling.config import LEAST_BATCH

OutputType = Literal["pil", "np", "pt"]
_PRECISIONS = (torch.float32, torch.bfloat16)
# The files that DiffusionPipeline.from_pretrained does not fetch from a hub, since diffusers does not know them.
_OURS = [DESCRIPTION, "README.md", "gallery.png", "unet/*", "vae/*", "segmenter/*", "model_index.json", "pipeline.py"]


class SegGuidedDiffusionPipeline(DiffusionPipeline):
    """Masks to images. The solver is segdiff's own, with the settings in segdiff.json: `scheduler` describes the
    process of the training for other programs, and another scheduler changes nothing here."""

    _optional_components = ["vae"]  # noqa: RUF012  # as diffusers declares it

    unet: Any
    vae: Any

    def __init__(self, unet: Any, scheduler: Any, vae: Any = None) -> None:
        """`unet`: as diffusers loaded it from FOLDER/unet; its weights and its precision are used. The rest of the
        network is read from the folder. `vae`: read again from the folder. Raises InputProblems."""
        super().__init__()
        self.folder = _whole_folder(Path(str(unet.config.get("_name_or_path", ""))).parent)
        self._made = SegGuidedPipeline.from_pretrained(self.folder, device="cpu")
        _take_weights(self._made.model.unet, unet)
        latent = self._made.model.latent
        vae = None if latent is None else latent.autoencoder.net
        self.register_modules(unet=self._made.model.unet, scheduler=scheduler, vae=vae)
        self._place(unet.device, unet.dtype)

    @torch.no_grad()
    def __call__(
        self,
        mask: Any,
        modality: str | None = None,
        *,
        axis: str = "axial",
        generator: Generator | Sequence[Generator] | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> Any:
        """ImagePipelineOutput: `.images` has one 8-bit image for each mask; a tuple of it without `return_dict`.

        mask: label ids [H, W] or [B, H, W] of `size` pixels, or a list of such masks; arrays, tensors, PIL images.
        modality: null is the model's first. generator: one, or one for each mask; the noise is drawn from it, as in
        other pipelines of diffusers. seed: in its place; image b has the noise of (seed, b), that of `segdiff sample`.
        num_inference_steps, guidance_scale: null is the exported sampler's. output_type: pil; np, float32 [B, H, W, 1]
        from 0 to 1; pt, float32 [B, 1, H, W]. Raises InputProblems, a ValueError.
        """
        made = self._set(num_inference_steps, guidance_scale)
        modality = made.model.trained_on[0] if modality is None else modality
        mask_BHW, _ = made.checked(_stacked(mask), modality, axis)
        if output_type not in ("pil", "np", "pt"):
            raise problem("pipeline", "output_type", output_type, "give pil, np or pt")
        item_ids = _item_ids(len(mask_BHW), generator, seed)
        with self._showing_progress(made, len(mask_BHW)):
            image_BHW = made.generate(mask_BHW, item_ids, modality, axis, seed or 0)
        images = _as_wanted(image_BHW, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def size(self) -> int:
        """Rows and columns of masks and images."""
        return self._made.size

    @property
    def labels(self) -> dict[int, str]:
        """The meaning of the ids in a mask."""
        return self._made.labels

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that the model was trained on."""
        return self._made.model.trained_on

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As DiffusionPipeline.to, with all parts of the network. Precision: float32 or bfloat16."""
        vae, self.vae = self.vae, None  # stays in fp32, as everywhere in segdiff
        try:
            super().to(*args, **kwargs)
        finally:
            self.vae = vae
        self._place(self.unet.device, self.unet.dtype)
        return self

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        """All parts of the network there, with the operators of that device."""
        if dtype not in _PRECISIONS:
            self._made.model.float()
            raise problem("pipeline", "dtype", str(dtype), "give torch.float32 or torch.bfloat16")
        model = self._made.model
        if device.type != self._made.device.type:
            weights = {name: value.cpu() for name, value in model.state_dict().items()}
            model = Denoiser.load(self.folder / UNET)
            model.load_state_dict(weights)
            model.prepare_for(device)
        self._made = replace(self._made, model=model.to(device=device, dtype=dtype), device=device)
        self.unet = model.unet
        if model.latent is not None:
            self.vae = model.latent.autoencoder.net.to(device)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the folder again, with the weights as they are now, in their precision. `push_to_hub`: then upload it;
        `kwargs` are those of push_to_hub."""
        if not safe_serialization or kwargs.pop("variant", None) is not None:
            raise problem(
                "pipeline", "save_pretrained", "pickle or a variant", "safetensors without a variant is written"
            )
        kwargs.pop("max_shard_size", None)
        save_again(self.folder, Path(save_directory), self._made.model)
        if push_to_hub:
            self._upload(Path(save_directory), kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the folder to a hub (HF_ENDPOINT), with its own model card; returns the commit's address. `kwargs`:
        commit_message, private, token, create_pr, as huggingface_hub's."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self._upload(Path(folder), repo_id, **kwargs)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        *,
        commit_message: str = "Upload a segmentation-guided diffusion pipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = hub.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message, create_pr=create_pr)
        return str(done.commit_url)

    def _set(self, steps: int | None, guidance: float | None) -> SegGuidedPipeline:
        made = self._made
        sampler = made.sampler if steps is None else replace(made.sampler, num_steps=steps)
        sampler = sampler if guidance is None else replace(sampler, guidance=guidance)
        refuse(sampler.problems(made.diffusion))
        return replace(made, sampler=sampler)

    @contextmanager
    def _showing_progress(self, made: SegGuidedPipeline, num: int) -> Iterator[None]:
        """The bar of set_progress_bar_config, one step for each image's pass through the network."""
        at_once = [min(made.num_at_once, num - at) for at in range(0, num, made.num_at_once)]
        images = sum(max(LEAST_BATCH, one) for one in at_once)
        with self.progress_bar(total=images * num_evaluations(made.sampler, made.diffusion)) as bar:
            hook = made.model.register_forward_pre_hook(lambda _, inputs: _advance(bar, len(inputs[0])))
            try:
                yield
            finally:
                hook.remove()


def _take_weights(net: torch.nn.Module, given: torch.nn.Module) -> None:
    """Those that both have: with SPADE the norms have no weights, and diffusers gives them some."""
    known = net.state_dict()
    net.load_state_dict(known | {name: value for name, value in given.state_dict().items() if name in known})


def _advance(bar: Any, num: int) -> None:
    bar.update(num)


def _whole_folder(folder: Path) -> Path:
    """The folder; of a hub's snapshot with the files that diffusers leaves there."""
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    if not (folder / DESCRIPTION).is_file() and repository.startswith("models--"):
        import huggingface_hub

        name = repository.removeprefix("models--").replace("--", "/", 1)
        cache = folder.parents[2]
        huggingface_hub.snapshot_download(name, revision=folder.name, cache_dir=cache, allow_patterns=_OURS)
    if not (folder / DESCRIPTION).is_file():
        remedy = "load the folder that `segdiff export --format pipeline` wrote, with DiffusionPipeline.from_pretrained"
        raise problem(folder, "pipeline", f"no {DESCRIPTION}", remedy)
    return folder


def _stacked(mask: Any) -> np.ndarray:
    def array(one: Any) -> np.ndarray:
        return one.cpu().numpy() if isinstance(one, torch.Tensor) else np.asarray(one)

    if not isinstance(mask, list | tuple):
        return array(mask)
    masks = [array(one) for one in mask]
    if len({one.shape for one in masks}) != 1:
        raise problem("pipeline", "mask", f"{len(masks)} masks of different sizes", "give masks of one size")
    return np.stack(masks)


def _item_ids(num: int, generator: Generator | Sequence[Generator] | None, seed: int | None) -> list[int]:
    """The noise's numbers: drawn from the generators; of a seed 0, 1, ..."""
    if seed is not None:
        if generator is not None:
            raise problem("pipeline", "seed", "beside a generator", "give one of them")
        refuse(problems_with_seed("seed", seed))
        return list(range(num))
    generators = [*generator] if isinstance(generator, Sequence) else [generator] * num
    if len(generators) != num:
        raise problem("pipeline", "generator", f"{len(generators)} for {num} masks", "give one, or one for each mask")
    return [_drawn(one) for one in generators]


def _drawn(generator: Any) -> int:
    if not isinstance(generator, Generator | None):
        raise problem("pipeline", "generator", repr(generator)[:60], "give a torch.Generator, or `seed`")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _as_wanted(image_BHW: np.ndarray, output_type: OutputType) -> Any:
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(image_HW) for image_HW in image_BHW]
    grey_BHW = image_BHW.astype(np.float32) / 255
    return grey_BHW[..., None] if output_type == "np" else torch.from_numpy(grey_BHW[:, None])
