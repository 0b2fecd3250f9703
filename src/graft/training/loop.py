"""The one training loop. Full, LoRA and QLoRA fine-tuning differ by the objects handed to it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graft.adapters.steering import steering_of
from graft.data.loader import Batch
from graft.errors import StopRequested, StorageError, TrainingError
from graft.evaluate.loss import evaluate_loss, token_losses
from graft.models.experts import Experts
from graft.runs import LineLog
from graft.training.audit import FILE as AUDIT
from graft.training.audit import RECOVERY_FILE as RECOVERY_AUDIT
from graft.training.audit import Audit
from graft.training.audit_findings import Subject
from graft.training.checkpoint import Checkpoint, Position, copy_into, save_checkpoint, stored_tensors
from graft.training.figures import figures_of
from graft.training.finite import check_finite
from graft.training.groups import treatments
from graft.training.job import Job, num_steps
from graft.training.optim import Optimizer
from graft.training.random_state import restore_random_state, seed_all
from graft.training.recompute import every
from graft.training.schedule import Schedule
from graft.training.spikes import remark
from graft.training.splitting import FILE as SPLITS
from graft.training.splitting import Splitter
from graft.training.starved import check_gradients


class _EvaluationStopped(Exception):  # noqa: N818 - a signal between two functions of this file
    """A stop was asked for while evaluating; the evaluation is made again on resume."""


class Training:
    """A run in motion: `Training(job, checkpoint).run()`.

    Args:
        job: The objects.
        checkpoint: Where to go on; None starts from the beginning.
    """

    def __init__(self, job: Job, checkpoint: Checkpoint | None = None) -> None:
        self.job = job
        treated = treatments(job.model, job.parameters, job.config, job.learning_rate)
        self.optimizer = Optimizer(job.parameters, job.config, treated, job.run.path)
        self.position = checkpoint.position if checkpoint else Position()
        steps = num_steps(job.loader, job.config)
        self.num_steps = job.first_step + steps
        self.steering = job.steering = steering_of(job.model, self.num_steps, settled=job.first_step > 0)
        self.schedule = Schedule.of(job.config, job.learning_rate, steps)
        self.device = next(iter(job.parameters.values())).device
        self.figures = figures_of(job, treated, self.num_steps)
        self._saved_step = self.position.step if checkpoint else -1
        self.splitter = Splitter(
            self.position.splits,
            job.run.path / SPLITS,
            lambda text: job.monitor.say(text),
            self._release,
            job.loader.rows_together,
        )
        self.audit = Audit(self._subject(fresh=checkpoint is None and not job.save_start), job.config.audit)
        self._experts = [path for path, module in job.model.named_modules() if isinstance(module, Experts)]
        if checkpoint:
            copy_into(self._stored(), checkpoint.trained, str(checkpoint.path))
            self.optimizer.load_state(checkpoint.optimizer)
            restore_random_state(checkpoint.random)
        else:
            seed_all(job.config.seed)

    def _subject(self, *, fresh: bool) -> Subject:
        job = self.job
        return Subject(
            job.model,
            job.parameters,
            self.optimizer,
            job.learning_rate,
            fresh,
            bool(every(job.config.gradient_checkpointing)),
            job.run.path / (RECOVERY_AUDIT if job.first_step else AUDIT),
            job.monitor.say,
        )

    def run(self) -> Position:
        """Train to the end.

        Returns:
            The final position.

        Raises:
            StopRequested: A signal came; the state is saved.
            TrainingError: Too many steps in a row without a finite loss, or a run that trains nothing.
            StorageError: The disk refused (the last checkpoint stands), or the directory was taken away.
        """
        job = self.job
        self.metrics = LineLog(job.run.metrics_path, self.position.metrics_bytes)
        self.timings = LineLog(job.run.timings_path)
        self.figures.spectra.open(job.run.spectra_path, self.position.spectra_bytes)
        job.model.train()
        job.monitor.start(self.position.step, self.num_steps)
        try:
            if self.job.save_start:
                self._save()
            self._catch_up()
            for batches in self._steps():
                self._step(batches)
                self._after_step()
                if self.position.stopped_early:
                    break
            if self.position.stopped_early:
                self.figures.spectra.stopped_early(self.position.step)
            self.audit.finish()
        except _EvaluationStopped:
            self._leave()
        finally:
            job.monitor.finish()
            self.optimizer.close()
            self.metrics.close()
            self.timings.close()
            self.figures.spectra.close()
        if (
            self.position.step
            and self.position.num_skipped + self.position.num_overflows == self.position.step
        ):
            raise TrainingError(
                f"none of {self.position.step} steps had a finite loss and gradient: nothing was trained",
                where=str(job.run.metrics_path),
                fix="lower adapter.alpha or training.learning_rate, or look at the data",
            )
        return self.position

    # One step.

    def _step(self, batches: list[Batch]) -> None:
        position, started = self.position, time.perf_counter()
        learning_rate = self.schedule.rate(position.step - self.job.first_step)
        self.audit.begin(batches[0])
        loss = self._accumulate(batches)
        norm = self.optimizer.gradient_norm() if math.isfinite(loss) else math.nan
        applied = math.isfinite(norm)
        by_group = self.figures.by_group(learning_rate, self.optimizer.norms)
        if applied:
            if position.step == 0 and not self.audit.on:
                check_gradients(self.job.parameters, self._experts)
            self.audit.before_update(learning_rate)
            if self.steering is not None:
                self.steering.before_update(position.step + 1)
            self.optimizer.step(learning_rate, norm)
        else:
            self.optimizer.clear()
        overflow = position.scale.after(loss, applied=applied) if self.job.scales_loss else None
        num_tokens = sum(batch.num_tokens for batch in batches)
        position.step += 1
        position.num_tokens += num_tokens
        position.num_labelled_tokens += sum(batch.num_labelled_tokens for batch in batches)
        position.num_overflows += overflow is not None
        if overflow is None:
            position.num_skipped += not applied
            position.num_skipped_in_row = 0 if applied else position.num_skipped_in_row + 1
        record: dict[str, Any] = {
            "step": position.step,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if applied else None,
            "learning_rate": learning_rate,
            "num_tokens": position.num_tokens,
            **by_group,
        }
        if self.job.objective is not None:
            record |= self.job.objective.figures()
        if self.steering is not None:
            record |= self.steering.figures()
        if self.job.scales_loss:
            record["loss_scale"] = position.scale.factor
        threshold, places = self.job.config.loss_spike_threshold, self.job.loader.places
        for told in remark(record, position.recent_losses, threshold, overflow):
            self.job.monitor.say(told)
        if "spike" in record or ("skipped" in record and not overflow):
            record["samples"] = [place for batch in batches for place in places(batch)]
        # First: whoever reads a step in the metrics finds its timing.
        self.timings.write(self.figures.timing(position.step, time.perf_counter() - started, batches))
        self.metrics.write(record)
        self.job.monitor.step(record, num_tokens)

    def _accumulate(self, batches: list[Batch]) -> float:
        """Gradients of the mean loss over all labelled tokens of the step; returns that mean.

        Every token weighs the same however the batches are cut, so the gradient is that of one large batch.
        """
        objective = self.job.objective
        num_labelled = sum(
            batch.num_labelled_tokens if objective is None else objective.weight(batch) for batch in batches
        )
        loss = self.splitter.run(self.position.step, batches, lambda parts: self._passes(parts, num_labelled))
        if self.job.scales_loss:
            self.position.scale.divide_out(p.grad for p in self.job.parameters.values())
        if self.steering is not None and math.isfinite(loss):
            added = self.steering.regularization()
            if added is not None:
                added.backward()  # once for the step, however many passes it has
        return loss

    def _stored(self) -> dict[str, Tensor]:
        return stored_tensors(self.job.model, self.job.parameters, self.steering)

    def _passes(self, batches: Iterator[Batch], num_labelled: int) -> float:
        objective, total = self.job.objective, 0.0
        for batch in batches:
            with self._precision(), self.job.recipes.hooks():
                if objective is None:
                    loss_sum, _ = token_losses(self.job.model, self._on_device(batch))
                else:
                    loss_sum = objective.loss(self.job.model, self._on_device(batch))
            total += float(loss_sum.detach())
            if not math.isfinite(total):
                break
            mean = loss_sum / num_labelled
            (mean * self.position.scale.factor if self.job.scales_loss else mean).backward()
            self.job.recipes.finish()
        return total / num_labelled

    def _release(self) -> None:
        self.optimizer.clear()
        self.job.recipes.release()
        if self.job.objective is not None:
            self.job.objective.figures()  # what the failed passes counted

    def _precision(self) -> AbstractContextManager[Any]:
        if self.job.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.job.autocast)

    def _on_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        moved = {
            name: getattr(batch, name).to(self.device) for name in ("input_ids", "position_ids", "labels")
        }
        return replace(batch, **moved)

    # Between steps.

    def _after_step(self) -> None:
        position, config = self.position, self.job.config
        self._check_place()
        self.audit.after_step(position.step)
        if self.steering is not None:  # after the audit, which sees what the optimizer did
            self.steering.after_step(position.step)
        self.figures.spectra.after_step(position.step)
        if position.num_skipped_in_row >= config.max_nonfinite_steps:
            raise TrainingError(
                f"{position.num_skipped_in_row} steps in a row without a finite loss and gradient",
                where=f"step {position.step}; {self._stands()}",
                fix="lower training.learning_rate, or look at the data of these steps",
            )
        if self._due(config.eval_steps) and self.job.eval_loader is not None:
            self._evaluate()
        if self._due(config.save_steps):
            self._save()
        if self.job.stop:
            self._leave()

    def _stands(self) -> str:
        step = self._saved_step
        return f"checkpoint step-{step:06d} stands" if step >= 0 else "nothing is saved"

    def _catch_up(self) -> None:
        """Make the evaluation that a stop prevented, so that a resumed run has the same log."""
        position = self.position
        due = position.step and self._due(self.job.config.eval_steps)
        if due and position.last_eval_step != position.step and self.job.eval_loader is not None:
            # Not saved again under the same name: until the next step, a second resume does the same.
            self._evaluate()

    def _due(self, every: int | None) -> bool:
        position = self.position
        if position.step == self.num_steps or position.stopped_early:
            return True
        return position.batch == 0 if every is None else position.step % every == 0

    def _evaluate(self) -> None:
        position, config, loader = self.position, self.job.config, self.job.eval_loader
        assert loader is not None
        batches, objective = self._until_stopped(loader.epoch(0)), self.job.objective
        figures: dict[str, float] = {}
        with self._precision():
            if objective is None:
                loss = evaluate_loss(self.job.model, batches).loss
            else:
                loss, figures = objective.evaluate(self.job.model, map(self._on_device, batches))
        best = position.best.update(
            loss, position.step, config.early_stopping_min_delta, config.keep_best_checkpoints
        )
        position.last_eval_step = position.step
        record: dict[str, Any] = {
            "step": position.step,
            "eval_loss": loss if math.isfinite(loss) else None,
            "best": best,
            **figures,
        }
        self.metrics.write(record)
        self.job.monitor.evaluated({**record, "eval_loss": loss})
        patience = config.early_stopping_patience
        if patience is not None and position.best.num_worse >= patience and position.step < self.num_steps:
            position.stopped_early = True
            self.job.monitor.say(
                f"stopped early: no better evaluation loss than {position.best.loss} "
                f"(step {position.best.step}) in {patience} evaluations"
            )
        if position.step in position.best.steps() or position.stopped_early:
            self._save()

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.job.stop:
                raise _EvaluationStopped
            yield batch

    def _save(self) -> None:
        if self._saved_step == self.position.step:
            return
        self._check_place()
        check_finite(self.job.parameters, f"step {self.position.step}; {self._stands()}")
        self.position.metrics_bytes, self.position.metrics_sha256 = self.metrics.sync(), self.metrics.sha256()
        self.position.spectra_bytes = self.figures.spectra.sync()
        try:
            save_checkpoint(
                self.job.run,
                self.position,
                self._stored(),
                self.optimizer.pending_state(),
                self.job.config.keep_checkpoints,
                self.job.settings,
            )
        except StorageError:
            self._check_place()  # a disk without the directory is not a full one
            raise
        self._saved_step = self.position.step

    def _check_place(self) -> None:
        """A log without a name takes what is written to it and keeps nothing."""
        if not self.metrics.in_place():
            self.job.run.refuse_removed()

    def _leave(self) -> None:
        self._save()
        raise StopRequested(
            f"stopped by {self.job.stop.received} after step {self.position.step} of {self.num_steps}; "
            "the state is saved",
            where=str(self.job.run.checkpoint_path(self.position.step)),
            fix=f"go on with `graft train --resume {self.job.run.path}`",
        )

    def _steps(self) -> Iterator[list[Batch]]:
        """The batches of each remaining step; moves the position's cursor past them."""
        position, size = self.position, self.job.config.gradient_accumulation_steps
        while position.step < self.num_steps and not position.stopped_early:
            num_batches = self.job.loader.num_batches(position.epoch)
            batches = self.job.loader.epoch(position.epoch, position.batch)
            while group := list(itertools.islice(batches, size)):
                position.batch += len(group)
                if position.batch >= num_batches:
                    position.epoch, position.batch = position.epoch + 1, 0
                yield group
                if position.step >= self.num_steps or position.stopped_early:
                    return
