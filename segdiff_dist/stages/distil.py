"""Distil a trained diffusion model into one that needs few sampling steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from data_shards.problems import problem, refuse
from segdiff_dist.denoising.distil_config import DistilConfig
from segdiff_dist.experiment import Experiment, collect, load_experiment, recorded_config
from segdiff_dist.ranks.distributed import world_size
from segdiff_dist.stages.base import Plan
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from segdiff_dist.denoising.distil_task import DistilTask, Teacher
    from segdiff_dist.stages.training_setup import TrainingSetup
    from segdiff_dist.tracking.tracker import Tracker

_SECTIONS = ("distil", "denoiser", "diffusion", "train", "validation", "loader")


@dataclass(frozen=True, kw_only=True)
class Distil(ConfiguredStage):
    """Train a student of a trained denoiser into RUN. It makes the teacher's guided images in few steps, and the other
    commands use it like any run. Exit code 3 when the training stopped itself."""

    on_ranks: ClassVar = True
    essential: ClassVar = (
        *("--distil.teacher", "--run", "--data", "--distil.num-steps", "--distil.teacher-steps"),
        *("--distil.sampler.guidance", "--distil.train.num-images", "--distil.train.global-batch-size"),
        *("--distil.train.micro-batch-size", "--distil.train.lr", "--distil.train.device"),
    )

    data: str | None = None
    """The shard set: a folder or a URL that fsspec knows. null: the teacher's."""
    run: Path | None = None
    """The student's run folder, another one than the teacher's."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def over(self, experiment: Experiment) -> Self:
        """The stage on the teacher's settings."""
        stage = super().over(experiment)
        return stage if self.distil.teacher is None else stage._taught(Path(self.distil.teacher))

    def check(self) -> Plan:
        """Opens the set; loads the teacher."""
        from segdiff_dist.denoising.distil_task import Teacher, teacher_passes, teacher_weights
        from segdiff_dist.denoising.network_shapes import denoiser_network
        from segdiff_dist.export.model_set import refuse_other_set
        from segdiff_dist.sampling.weights import weights_digest
        from segdiff_dist.stages.training_plan import TrainingPlan

        setup = self._open()
        shards, distil = setup.shards, setup.experiment.distil
        folder = teacher_weights(distil, self._average)
        teacher = Teacher.load(folder, self.experiment.diffusion, weights_digest(folder))
        others = partial(_refuse_others, setup, teacher)
        collect(
            lambda: refuse(teacher.problems(shards, setup.side, setup.modalities)),
            lambda: refuse(distil.teacher_problems(teacher.diffusion)),
            lambda: refuse(self.tracking.problems()),
            setup.check_device,
            others,
            lambda: refuse_other_set(
                Path(str(distil.teacher)), shards, "give --data the set of the teacher's training"
            ),
        )
        passes, network = teacher_passes(teacher.diffusion, distil), teacher.model.config
        return TrainingPlan(
            setup=setup,
            stage="distil",
            loader=setup.experiment.loader,
            network=denoiser_network(network, shards, setup.side, setup.device).with_forwards(passes),
            make_task=partial(_make_task, setup, teacher),
            refuse_others=others,
            saved_sections=(*_SECTIONS, "data", "more_data", "sample"),
            logged_sections=_SECTIONS,
            message=f"distil: {setup.device}, {setup.config.precision}; {distil.num_steps} steps for "
            f"{distil.sampler.num_steps} of the teacher, guidance {distil.sampler.guidance:g}, {passes} passes of the "
            "teacher an image",
            next_command=setup.command("sample"),
        ).checked()

    def _open(self) -> TrainingSetup:
        """The set and the student's run folder, which is not the teacher's. Its `train` is `distil.train`."""
        from segdiff_dist.denoising.distil_task import teacher_weights
        from segdiff_dist.stages.training_setup import TrainingSetup

        run, _ = collect(lambda: self.path("run"), lambda: teacher_weights(self.distil, self._average))
        _refuse_the_teachers_run(self.experiment, run)
        refuse(self.distil.problems(world_size()))
        setup = TrainingSetup.open(self, "distil.train")
        return replace(setup, experiment=replace(setup.experiment, train=setup.config))

    @property
    def _average(self) -> str:
        """The first average of the teacher."""
        given = self.distil.teacher
        return "" if given is None else load_experiment(None, Path(given)).train.averages[0]

    def _taught(self, run: Path) -> Self:
        """The stage with the experiment of the teacher in `run`, except for what is the student's own."""
        from segdiff_dist.denoising.distil_task import as_student, teacher_weights, trained_diffusion

        of_teacher, own = load_experiment(None, run), self.experiment
        trained = trained_diffusion(teacher_weights(self.distil, self._average), of_teacher.diffusion)
        distil = self.distil.filled_in(of_teacher.sample.sampler, trained)
        diffusion, sampler = trained, of_teacher.sample.sampler
        if not distil.problems() + distil.teacher_problems(trained):
            diffusion, sampler = as_student(trained, distil)
        segmenter = of_teacher.evaluate.segmenter
        if segmenter is None and (run / "segmenter" / "weights").is_dir():
            segmenter = run / "segmenter" / "weights"
        experiment = replace(
            of_teacher,
            run=own.run,
            data=own.data or of_teacher.data,
            tracking=own.tracking,
            distil=distil,
            diffusion=diffusion,
            train=distil.train,
            sample=replace(of_teacher.sample, sampler=sampler, weights="ema", out=None),
            evaluate=replace(of_teacher.evaluate, segmenter=segmenter),
        )
        return replace(self, data=experiment.data, distil=distil, experiment=experiment)


def _refuse_the_teachers_run(experiment: Experiment, run: Path) -> None:
    """Another training's run folder is not the student's."""
    recorded = recorded_config(experiment, run / "checkpoints")
    if run.resolve() == Path(str(experiment.distil.teacher)).resolve():
        raise problem("command line", "--run", run, "the teacher's own: give another run folder")
    if recorded is not None and load_experiment(recorded, None).distil.teacher is None:
        raise problem(run, "--run", "holds another training", "give another run folder")


def _refuse_others(setup: TrainingSetup, teacher: Teacher) -> None:
    """Refuse to go on with a training of other settings, or of another teacher."""
    from segdiff_dist.denoising.distil_task import refuse_another_teacher

    collect(
        lambda: setup.check_settings("distil", "loader"),
        lambda: refuse_another_teacher(setup.run / "weights", teacher),
    )


def _make_task(setup: TrainingSetup, teacher: Teacher, tracker: Tracker) -> DistilTask:
    """The training task and its pictures."""
    from segdiff_dist.denoising.distil_task import DistilTask, as_student
    from segdiff_dist.denoising.sample_grid import SampleGrids
    from segdiff_dist.denoising.validation import DenoiserValidation, HeldOutSlices

    shards, loader, distil = setup.shards, setup.experiment.loader, setup.experiment.distil
    held_out = shards.select(split="val", modalities=loader.modalities, axes=loader.axes)
    diffusion, sampler = as_student(teacher.diffusion, distil)
    validation = DenoiserValidation(
        HeldOutSlices(shards, held_out, loader, teacher.model.config.soft_masks),
        diffusion,
        sampler,
        setup.experiment.validation,
        setup.device,
        SampleGrids(setup.run / "pictures", shards.label_table, tracker),
    )
    return DistilTask(shards, teacher, distil, setup.run / "weights", setup.device, validation)
