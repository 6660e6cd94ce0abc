"""The only training loop: plain training is distillation without methods."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.detectors.base import Detector
from kdcli.detectors.weights import export, load_detector
from kdcli.digest import DIGEST
from kdcli.engine.evaluation.evaluate import evaluate, plain_forward
from kdcli.engine.loading.epoch_order import image_draws, plan_epoch
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.loading.seen import SeenImages
from kdcli.engine.runtime import distributed
from kdcli.engine.runtime.memory import peak_memory_bytes
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.engine.runtime.stopping import Stopped, held
from kdcli.engine.training import run_folder
from kdcli.engine.training.checkpoint import Parts, TrainingState, load_state, save_state
from kdcli.engine.training.final_metrics import final_metrics
from kdcli.engine.training.guards import (
    ZeroGuard,
    gradient_norms,
    require_finite,
    require_sane_gradients,
    unusual_values,
)
from kdcli.engine.training.optim import WeightAverage, check_ownership, lr_factor, make_optimizer, scaled_lr
from kdcli.engine.training.setup import RunSetup
from kdcli.engine.training.step import TrainStep
from kdcli.errors import OptionError
from kdcli.files import atomic_save, remove_leftovers
from kdcli.structures import Batch
from kdcli.tensors import world_mean, world_size


class Trainer:
    """One run from its prepared parts; ``fit`` brings it to its end, from wherever it is."""

    def __init__(self, setup: RunSetup, run: Path, reporter: ProgressReporter) -> None:
        options = setup.options
        self.setup, self.options, self.run, self.reporter = setup, options, run, reporter
        self.device = setup.device
        distributed.share_batch_norm(setup.student, setup.student.spec.bn, self.device)
        self.step = TrainStep(setup.student, setup.methods, setup.amp, options.channels_last).to(self.device)
        self.synchronised = distributed.synchronised(self.step, self.device)
        self.optimizer = make_optimizer(self.step, options.optim, options.batch)
        check_ownership(self.step, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=setup.amp is torch.float16)
        self.average = WeightAverage(setup.student, options.optim.ema_decay) if options.optim.ema else None
        self.guard = ZeroGuard()
        self.peak_lr = scaled_lr(options.optim, options.batch)
        self.student_parameters = [p for p in setup.student.parameters() if p.requires_grad]
        self.method_parameters = [p for p in self.step.methods.parameters() if p.requires_grad]
        self.state = TrainingState()
        self.identity: str | None = None  # of the run: a state of another one is refused
        self.parts = Parts(
            step=self.step, optimizer=self.optimizer, scaler=self.scaler, average=self.average, guard=self.guard,
            seen={"train": SeenImages(setup.train), "val": SeenImages(setup.val)},
        )  # fmt: skip

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch, evaluate, write the run folder's files, and return the final metrics."""
        options = self.options
        if distributed.is_main():
            remove_leftovers(self.run)
        distributed.barrier()
        self.identity = run_folder.read_env(self.run).get(DIGEST)
        self.state = load_state(self.run, self.identity, self.parts, options.epochs)
        state = self.state
        best = self.run / "weights" / "best.pt"
        if state.best_ap is not None and not best.is_file():
            raise OptionError(f"'{best}' of epoch {state.best_epoch} is missing; put it back, or start a new run")
        loader = Loader(self.setup.source, self.setup.workers, self.parts.seen["train"])
        val_loader = self._val_loader()
        evaluation: dict[str, Any] = {}
        try:
            while state.epoch < options.epochs:
                plan = self._plan(state.epoch)
                if state.batch > len(plan):  # after all of them it was stopped while it evaluated
                    raise OptionError(
                        f"'{self.run / run_folder.STATE_FILE}' is after {state.batch} batches of an epoch of {len(plan)}"
                    )
                self.reporter.stage(f"epoch {state.epoch + 1}/{options.epochs}", len(plan))
                self.reporter.advance(state.batch)
                self._run_epoch(loader, plan)
                # each process saw other images: without this the AP would be that of no checkpoint
                distributed.take_from_main(self.step.buffers())
                if self.average is not None:
                    distributed.take_from_main(self.average.state.values())
                last = state.epoch + 1 == options.epochs
                due = last or (state.epoch + 1) % options.eval_every == 0
                evaluation = self._evaluate(val_loader) if due else {}
                with held():
                    self._finish_epoch(evaluation)
        except Stopped:
            self._save()
            raise
        return self._finish(evaluation)

    def _plan(self, epoch: int) -> list[Any]:
        made, options = self.setup, self.options
        return plan_epoch(
            made.source, made.positions, made.views, seed=options.seed, epoch=epoch, batch=options.batch,
            world=world_size(), rank=distributed.world_rank(), shuffle=options.shuffle,
        )  # fmt: skip

    def _run_epoch(self, loader: Loader, plan: list[Any]) -> None:
        state = self.state
        self.step.train()
        if state.batch == 0:
            state.sums, state.shares = {}, {}
        batches = _timed(loader.batches(plan[state.batch :]))
        mark = time.perf_counter()
        for waited, batch in batches:
            with held():  # the state is that of whole steps
                info = self._train_batch(batch, len(plan))
                state.batch += 1
                state.step += 1
                now = time.perf_counter()
                self._add(seconds=now - mark, wait_s=waited, images=len(batch.keys) * world_size(), steps=1)
                state.wall_s += now - mark
                mark = now
            self.reporter.advance(1, info)
            if state.step % self.options.save_steps == 0 and state.batch < len(plan):
                self._save()

    def _train_batch(self, batch: Batch, steps_per_epoch: int) -> str:
        state, options = self.state, self.options
        lr = self.peak_lr * lr_factor(options.optim, state.step, steps_per_epoch, options.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        draws = image_draws(batch.keys, options.seed, state.epoch)
        batch = replace(batch, targets=replace(batch.targets, draws=draws)).to(self.device)
        started = time.perf_counter()
        teacher = self.setup.teacher.forward(batch) if self.setup.teacher else {}
        self._add(teacher_s=time.perf_counter() - started)
        detection, distillation = self.synchronised(batch, teacher)
        terms = detection | distillation
        flags = torch.tensor([float(self.step.active(name, batch)) for name in distillation], device=self.device)
        stacked = torch.cat([torch.stack([t.detach() for t in terms.values()]), flags])
        # the global batch's terms, and whether one is active anywhere: every process then decides the same
        found = world_mean(stacked).tolist()
        values = dict(zip(terms, found[: len(terms)], strict=True))
        require_finite(values, state.step)
        active = dict(zip(distillation, (flag > 0 for flag in found[len(terms) :]), strict=True))
        self.guard.check({name: values[name] for name in distillation}, active, state.step)
        if state.batch == 0 and distillation:
            self._measure_shares(detection, distillation, values)
        loss = torch.stack(list(terms.values())).sum()
        norm = self._update(loss)
        self._add(**values, loss=sum(values.values()), grad_norm=norm)
        return f"loss {sum(values.values()):.3f}"

    def _update(self, loss: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        # apart: an adapter's first gradient can be 1e5, and clipped together the student would stand still
        norm, adapters = (self._clip(p) for p in (self.student_parameters, self.method_parameters))
        if not self.scaler.is_enabled():  # the scaler skips such a step by itself and lowers its scale
            require_finite({"gradient_norm": norm, "adapter_gradient_norm": adapters}, self.state.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.setup.student)
        return norm if norm < float("inf") else 0.0

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        """The norm of their gradient, which is clipped if asked for."""
        if self.options.optim.clip:
            return float(nn.utils.clip_grad_norm_(parameters, self.options.optim.clip))
        return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def _measure_shares(
        self, detection: dict[str, Tensor], distillation: dict[str, Tensor], values: dict[str, float]
    ) -> None:
        """Gradient norms on the first batch of an epoch: each term's share, and the guards of the very first step."""
        whole = {"detection": torch.stack(list(detection.values())).sum(), **distillation}
        local = gradient_norms(self.student_parameters, whole)
        norms = dict(
            zip(local, world_mean(torch.tensor(list(local.values()), device=self.device)).tolist(), strict=True)
        )
        # a term's first gradient is that of the first measured batch on which it has one
        first = [n for n in distillation if norms[n] > 0 and n not in self.state.checked]
        if first:
            options = {n: self.step.weight_option(n) for n in first}
            limit = self.options.gradient_limit
            found = require_sane_gradients({n: norms[n] for n in first}, norms["detection"], options, limit)
            self.state.checked += first
            dense = {n for n in first if any(need.dense for need in self.step.owner(n)[1].needs)}
            found += unusual_values({n: values[n] for n in first}, sum(values[n] for n in detection), dense)
            for message in found:
                self.reporter.message(message)
        total = sum(norms.values()) or 1.0
        self.state.shares = {f"grad_share_{name}": norm / total for name, norm in norms.items()}

    def _val_loader(self) -> Loader:
        made = self.setup
        source = SampleSource.for_evaluation(made.val, made.canvas, made.student)
        return Loader(source, made.workers, self.parts.seen["val"])

    def _evaluate(self, loader: Loader) -> dict[str, Any]:
        started = time.perf_counter()
        student = self._final_student()
        self.reporter.stage("evaluate", self.setup.val.num_images - len(self.setup.val_left_out))
        found = evaluate(
            student,
            self.setup.val,
            self.setup.canvas,
            device=self.device,
            batch=self.options.batch,
            loader=loader,
            forward=plain_forward(student, self.setup.amp),
            left_out=self.setup.val_left_out,
            advance=self.reporter.advance,
        )
        m = found.metrics
        return {
            "ap": m.ap, "ap50": m.ap50, "ap75": m.ap75, "ap_s": m.ap_s, "ap_m": m.ap_m, "ap_l": m.ap_l, "ar": m.ar,
            "per_class": m.per_class, "images_per_s": found.images_per_s, "parameters": found.parameters,
            "evaluation_s": time.perf_counter() - started,
        }  # fmt: skip

    def _final_student(self) -> Detector:
        """The student that is evaluated and exported: its moving average when there is one."""
        if self.average is None:
            return self.setup.student
        student = copy.deepcopy(self.setup.student)
        student.load_state_dict(self.average.state)
        return student

    def _finish_epoch(self, evaluation: dict[str, Any]) -> None:
        state = self.state
        state.wall_s += evaluation.get("evaluation_s", 0.0)
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory_bytes(self.device))
        row = state.epoch_row(self.optimizer.param_groups[0]["lr"], evaluation)
        state.history.append(row)
        ap = evaluation.get("ap")
        files = ["last"]
        if ap is not None and (state.best_ap is None or ap > state.best_ap):
            state.best_ap, state.best_epoch = ap, state.epoch + 1
            files = ["best", "last"]
        if distributed.is_main():
            checkpoint = self._checkpoint(evaluation)
            for name in files:
                atomic_save(checkpoint, self.run / "weights" / f"{name}.pt")
            run_folder.write_results(self.run, state.history)
        state.epoch += 1
        state.batch = 0
        self._save()
        shown = "" if ap is None else f"  AP {ap:.1f}  AP50 {evaluation['ap50']:.1f}"
        self.reporter.message(
            f"epoch {row['epoch']}/{self.options.epochs}  loss {row['loss']:.3f}{shown}  {row['images_per_s']:.1f} "
            f"images/s  data wait {row['data_wait_percent']:.0f} %  {row['epoch_s']:.0f} s"
        )

    def _checkpoint(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        extra = {
            "ap": evaluation.get("ap"),
            "epoch": self.state.epoch + 1,
            "store": None if self.setup.teacher is None else self.setup.teacher.store_hash,
        }
        return export(self._final_student(), self.setup.train.classes, str(self.setup.canvas), extra)

    def _finish(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        state = self.state
        if not evaluation:  # killed after the last epoch's state, before metrics.json: evaluate again
            self.step.eval()
            evaluation = self._evaluate(self._val_loader())
        distributed.barrier()  # the weights are written
        weights = [(name, self.run / "weights" / f"{name}.pt") for name in ("last", "best")]
        hashes = {name: load_detector(file)[1].weights_sha256 for name, file in weights if file.is_file()}
        metrics = final_metrics(
            state, evaluation, self.setup.teacher, self.options.teacher_precision, hashes, self.identity
        )
        if distributed.is_main():
            run_folder.write_results(self.run, state.history)
            run_folder.write_metrics(self.run, metrics)
            (self.run / run_folder.STATE_FILE).unlink(missing_ok=True)
        distributed.barrier()  # the next run of a queue looks at these files
        return metrics

    def _save(self) -> None:
        seen = {split: images.to_tensor() for split, images in self.parts.seen.items()}  # of all processes
        if distributed.is_main():
            save_state(self.run, self.identity, self.state, self.parts, seen)

    def _add(self, **values: float) -> None:
        sums = self.state.sums
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[float, Batch]]:
    """Each batch with the seconds that were waited for it."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield time.perf_counter() - started, batch
