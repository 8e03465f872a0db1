"""TransformerTrainer: the training loop.

Each step: read packed rows, predict the next characters, compute the loss (cross entropy, in nats per token), and let
the optimizers change the weights. The learning rate stays at its peak for a while, then falls in a straight line to
zero. All that a run knows goes into its folder, so that it can be continued exactly where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shlex
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from studytiny.checkpoint import CONFIG_FILE, load_folder, read_config, save_checkpoint
from studytiny.errors import UserError, describe_os_error
from studytiny.generator import Generator
from studytiny.model import DialogueModel
from studytiny.sampling import SamplingConfig
from train.config import TrainConfig, learning_rate
from train.corpus import ConvDataset
from train.dataset import IGNORED, NEVER, fold
from train.distributed import Group, own_device
from train.measures import bits_per_character
from train.optimizer import build_optimizers, load_optimizers, optimizer_tensors
from train.run_log import PROMPTS, RunLog, read_samples
from train.signals import stop_signals
from train.snapshots import Snapshot, delete_snapshots, load_snapshot, locked, newest_step, save_snapshot

VALIDATION_DIALOGUES = 200  # enough to see where training goes; train.evaluate measures on all
MEASUREMENTS = 10  # how often a run measures and saves, unless it is told to after so many epochs
SAMPLE_STAGES = (1 / 3, 2 / 3, 1.0)
LOG_STEPS = 10  # a line of metrics.jsonl each
PLANNED_AT = (1, 4, 16, 64, 256)  # steps after which a run by minutes plans anew: the first ones are slow
GROWN_COST = 1.7  # of a step with all blocks, in units of one with half of them
MOST_BAD_STEPS = 3  # in a row, with a loss that is no number
BAR = "{desc} {percentage:3.0f}%|{bar:30}| 已用 {elapsed}，还需 {remaining}{postfix}"


def bfloat16_is_faster(device: torch.device) -> bool:
    """Measured, not looked up: many CPUs accept bfloat16 and are slower with it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.randn(1024, 512).to(dtype), torch.randn(512, 1024).to(dtype)
        best = math.inf
        for _ in range(5):  # the first runs set things up; the best one is the least disturbed
            start = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def add_targets(batch: Mapping[str, Tensor], user_share: float) -> dict[str, Tensor]:
    """Adds ``targets`` (B, T), the token that follows each place, or -100 where that is not learnt.

    Learnt are the assistant's words and, drawn at random, ``user_share`` of the rest of the dialogue; never a reply
    whose ``labels`` are -101, which become -100.
    """
    ids, labels, segments = batch["input_ids"], batch["labels"], batch["segments"]
    following = F.pad(ids[:, 1:], (0, 1))
    same_dialogue = F.pad((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0), (0, 1))
    drawn = same_dialogue & (labels == IGNORED) & (torch.rand(ids.shape) < user_share)
    labels = labels.masked_fill(labels == NEVER, IGNORED)
    return {**batch, "labels": labels, "targets": torch.where(drawn, following, labels)}


class TransformerTrainer:
    """Trains a DialogueModel on the rows of ``train_loader`` and writes a model folder."""

    def __init__(
        self,
        model: DialogueModel,
        train_loader: DataLoader,
        device: torch.device | str,
        config: TrainConfig | Mapping[str, Any],
        resume: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """``train_loader`` loads a DialogueDataset: its tokenizer is saved with the model, its held-out dialogues
        measure the progress.

        Args:
            resume: go on with the run in ``config.out``, exactly where it was saved last.
            facts: what the run is about, kept with each save (JSON) for whoever resumes it.

        Raises:
            UserError: a setting is wrong, the vocabulary is not the model's, ``config.out`` holds a model already, or
                there is nothing to resume in it.
        """
        self.config = config if isinstance(config, TrainConfig) else TrainConfig.from_mapping(config)
        self.device = own_device(torch.device(device))
        self.group = Group.from_environment(self.device)
        self.model = model.to(self.device)
        self.train_loader = train_loader
        self.tokenizer = train_loader.dataset.tokenizer
        self.facts = dict(facts or {})
        if self.tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"词表有 {self.tokenizer.vocab_size} 项，模型是按 {model.config.vocab_size} 项建的；"
                "请用 DialogueModel(tokenizer.vocab_size, ...) 建模型。"
            )
        self.group.check_rows(train_loader.batch_size or train_loader.batch_sampler.batch_size)
        self.validation = train_loader.dataset.conv_dataset.held_out_dialogues()[:VALIDATION_DIALOGUES]
        self.corpus_sha256 = corpus_sha256(train_loader.dataset.conv_dataset)
        self.resuming = resume
        # What a save holds beside weights and optimizers.
        self.steps = 0
        self.epoch = 0
        self.groups_done = 0  # optimizer steps of this epoch
        self.seconds = 0.0  # of training so far
        self.tokens = 0
        self.total_steps = self.config.epochs * self.steps_an_epoch if self.config.minutes is None else 0
        self.history: list[dict[str, float]] = []  # one entry a measurement
        self.recent = [0.0, 0]  # sum and number of the losses since the last measurement
        self.logged = [0, 0.0, 0]  # steps, seconds and tokens at the last line of the log
        self.unlogged: list[float] = []  # losses since then
        self.bad_steps = 0  # in a row
        self.depth = 0  # blocks that learn, in a model that grows
        self.stages = 0  # of the samples
        self.amp = False
        if not resume:
            check_new_run(self.config.out)
            wish = self.config.use_amp and bfloat16_is_faster(self.device)
            # A measured choice could come out otherwise in another process, or when the run is resumed.
            self.amp = bool(self.group.from_first([wish], self.device)[0])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.config.dropout
        self.optimizers = self.build_optimizers()

    # What a recipe is made of; the original's recipe overrides these.

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.config.lr, self.config.weight_decay)

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.steps / max(1, self.total_steps)

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return learning_rate(self.progress, self.config)

    def divisors(self, counts: Sequence[int]) -> list[int]:
        """By what the summed loss of each batch of a step is divided, given their numbers of targets.

        By the targets of all batches: the result is that of one large batch, however it is split.
        """
        return [sum(counts)] * len(counts)

    def compute_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of -ln p: over the batch's targets, to learn from, and over the assistant's words, to look at."""
        batch = {name: values.to(self.device) for name, values in fold(batch).items()}
        wanted = batch["targets"] != IGNORED
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            hidden = self.model.hidden_states(batch["input_ids"], batch["segments"])
            # The output layer is a good part of the work, and many places have nothing to learn.
            logits = self.model.unembed(hidden[wanted])
        losses = F.cross_entropy(logits.float(), batch["targets"][wanted], reduction="none")
        return losses.sum(), losses.detach()[batch["labels"][wanted] != IGNORED].sum()

    # The loop.

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.config.grad_accum_steps)

    def step(self, batches: Sequence[Mapping[str, Tensor]], rate: float) -> float:
        """One optimizer step on the given batches together.

        Returns:
            Their mean loss over the assistant's words, in nats per token; if it is no finite number, nothing was
            learnt.
        """
        self.model.train()
        if self.config.grow:
            layers = self.model.config.n_layers
            wanted = max(1, layers // 2) if self.progress < self.config.grow else layers
            self.depth = self.model.depth = max(self.depth, wanted)
        # What is drawn follows from seed and step, so there is no state of it to save.
        torch.manual_seed(self.config.seed * 1_000_003 + self.steps)
        batches = [add_targets(batch, self.config.user_share) for batch in batches]
        divisors = self.divisors([int((batch["targets"] != IGNORED).sum()) for batch in batches])
        labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        torch.manual_seed((self.config.seed * 1_000_003 + self.steps) * 1009 + self.group.rank)  # for dropout
        total = 0.0
        for batch, divisor in zip(batches, divisors, strict=True):
            loss, reply_loss = self.compute_loss(self.group.share_of(batch))
            (loss / divisor).backward()
            total += reply_loss.item()
        parameters = list(self.model.parameters())
        self.group.add_gradients(parameters)
        [total] = self.group.add([total], self.device)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if math.isfinite(total) and math.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate_scale"]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    optimizer.step()
        else:
            total = math.nan
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += sum(int((batch["segments"] >= 0).sum()) for batch in batches)
        return total / labels

    def train(self) -> list[dict[str, float]]:
        """Trains to the end of the epochs or minutes; measures and saves on the way, at the end, and when told to stop.

        Returns:
            The measurements: step, epoch, loss (nats per token, mean since the last one), bits_per_char (held-out).

        Raises:
            UserError: the loss is no longer a number, or another run uses the folder; the last save stays as it was.
            KeyboardInterrupt, SystemExit: told so by Ctrl-C or SIGTERM, after saving.
        """
        out = Path(self.config.out)
        if self.group.rank > 0:
            self.group.wait()  # for process 0 to have looked at the folder
            if self.resuming:
                self._resume()
            with stop_signals() as signals:
                self._train(signals, None)
            return self.history
        with locked(out), stop_signals() as signals:
            if self.resuming:
                self._resume()
            else:
                check_new_run(out)  # another run may have come and gone since the constructor looked
            self.group.wait()
            for half_written in out.glob(".*.tmp"):  # by a run that was killed; they would pile up
                half_written.unlink(missing_ok=True)
            log = RunLog(out, self.steps, self.config.tensorboard)
            try:
                with contextlib.closing(log):
                    self._train(signals, log)
            except OSError as error:
                raise UserError(self._describe(error)) from error
        return self.history

    def _train(self, signals: list[int], log: RunLog | None) -> None:
        self._clock = time.monotonic() - self.seconds
        self._planned = (self.steps, self.seconds)  # when total_steps was set
        self._measuring = 0.0  # seconds that it took last time
        silent = {"disable": True} if self.group.rank > 0 else {}  # left out, it is TQDM_DISABLE's to say
        total = self.total_steps or None
        bar = tqdm(total=total, initial=self.steps, desc="训练", bar_format=BAR, mininterval=0.5, **silent)
        self.group.same_weights(self.model.parameters())
        with bar:
            for batches in self._batches():
                if self._is_over():
                    break
                rate = self.learning_rate()
                loss = self.step(batches, rate)
                self.groups_done += 1
                self.seconds = time.monotonic() - self._clock
                self._count(loss)
                if math.isfinite(loss):
                    self.unlogged.append(loss)
                if self.config.minutes is not None and self.steps in PLANNED_AT:
                    self._plan()
                at_moment = bool(self.group.from_first([self._at_moment()], self.device)[0])
                if self.unlogged and (self.steps - self.logged[0] >= LOG_STEPS or at_moment):
                    self._log_training(log, rate, bar)
                bar.total = self.total_steps or None
                bar.update(1)
                if at_moment:
                    bar.write(self._measure_and_save(log))
                    before, self.seconds = self.seconds, time.monotonic() - self._clock
                    self._measuring = self.seconds - before
                    self.logged = [self.steps, self.seconds, self.tokens]
                    if self.config.minutes is not None:
                        self._plan()
                    if self._worse() >= self.config.patience:
                        bar.write(f"连续 {self._worse()} 次没有进步，提前结束；保存的是最好的一次。")
                        break
                # After measuring: a run that goes on from here would not come back to it.
                if self.group.add([len(signals)], self.device)[0]:
                    self._save_and_leave(signals, bar)
        self._finish(log)

    def _log_training(self, log: RunLog | None, rate: float, bar: tqdm) -> None:
        loss = sum(self.unlogged) / len(self.unlogged)
        speed = (self.tokens - self.logged[2]) / max(1e-9, self.seconds - self.logged[1])
        if log:
            log.training(
                step=self.steps, epoch=self.epoch, seconds=round(self.seconds, 3), tokens=self.tokens, loss=loss,
                learning_rate=rate, tokens_per_second=round(speed, 1),
            )  # fmt: skip
        bar.set_postfix_str(f"损失 {loss:.3f}{self._outlook()}", refresh=False)
        self.logged, self.unlogged = [self.steps, self.seconds, self.tokens], []

    def _batches(self) -> Iterator[list[Mapping[str, Tensor]]]:
        """The batches of each optimizer step, epoch after epoch, from where the run stands; an epoch's last step may
        have fewer. The order of an epoch follows from the seed."""
        while True:
            random = self.train_loader.generator  # without one of its own, the loader uses torch's
            (random.manual_seed if random is not None else torch.manual_seed)(self.config.seed * 10_007 + self.epoch)
            groups = _in_groups(self.train_loader, self.config.grad_accum_steps)
            yield from islice(groups, self.groups_done, None)
            self.epoch += 1
            self.groups_done = 0

    def _is_over(self) -> bool:
        # Asked here too: a run may have been killed after the measurement that ends it.
        return 0 < self.total_steps <= self.steps or self._worse() >= self.config.patience

    def _at_moment(self) -> bool:
        """True if the run should measure and save now."""
        if self._is_over():
            return True
        if self.config.minutes is None:
            every = self.steps_an_epoch * (self.config.save_every or self.config.epochs / MEASUREMENTS)
            return self.steps // every > (self.steps - 1) // every
        # In a run of a minute or two, measuring ten times would take the time to learn.
        waited = self.seconds - self._planned[1]
        return self.steps > 16 and waited >= max(self.config.minutes * 60 / MEASUREMENTS, self._measuring * 10)

    def _plan(self) -> None:
        """Sets ``total_steps`` so that the run ends with its time, at the speed since the plan before."""
        self.seconds = time.monotonic() - self._clock
        steps, seconds = self._planned
        speed = (self.steps - steps) / max(1e-9, self.seconds - seconds)
        left = max(0.0, self.config.minutes * 60 - self.seconds) * speed  # steps, if all cost what the last ones did
        total = self.steps + left
        if self.config.grow and self.depth < self.model.config.n_layers:
            # left = (grow total - steps) + GROWN_COST (1 - grow) total
            total /= self.config.grow + GROWN_COST * (1 - self.config.grow)
        self.total_steps = int(self.group.from_first([max(self.steps, round(total))], self.device)[0])
        self._planned = (self.steps, self.seconds)

    def _count(self, loss: float) -> None:
        if math.isfinite(loss):
            self.recent = [self.recent[0] + loss, self.recent[1] + 1]
            self.bad_steps = 0
            return
        self.bad_steps += 1
        if self.bad_steps >= MOST_BAD_STEPS:
            raise UserError(
                f"第 {self.steps} 步起连续 {MOST_BAD_STEPS} 步的损失不是有限的数；请把学习率 lr 调小一些再训练。"
            )

    def _describe(self, error: OSError) -> str:
        full = error.errno in (errno.ENOSPC, errno.EFBIG)
        what = f"磁盘满了，写不进 {self.config.out}；" if full else describe_os_error(error)
        if newest_step(self.config.out) is None:
            return f"{what}还没有保存过，解决之后请重新训练。"
        return f"{what}先前保存的都还在，解决之后接着训练：{self._how_to_resume()} 。"

    def _outlook(self) -> str:
        """The held-out bits per character to expect at the end: a straight line through the last measurements, both
        axes logarithmic, which is how losses fall."""
        points = [(entry["step"], entry["bits_per_char"]) for entry in self.history[-3:] if "bits_per_char" in entry]
        if len(points) < 2 or points[-1][1] >= points[0][1]:
            return ""
        (first, high), (last, low) = points[0], points[-1]
        slope = math.log(low / high) / math.log(last / first)
        return f"，预计 {low * (self.total_steps / last) ** slope:.2f} 比特/字"

    def _worse(self) -> int:
        """How many measurements ago the best one was."""
        bits = [entry.get("bits_per_char", 0.0) for entry in self.history]
        return len(bits) - 1 - max((i for i, value in enumerate(bits) if value == min(bits)), default=-1)

    def _measure_and_save(self, log: RunLog | None) -> str:
        """Measures on held-out dialogues, lets the model speak at a third and two thirds of the run, and saves."""
        entry = {"step": self.steps, "epoch": self.epoch, "loss": self.recent[0] / max(1, self.recent[1])}
        line = f"第 {self.steps} 步　损失 {entry['loss']:.3f}"
        if self.group.rank == 0 and self.validation:
            entry["bits_per_char"] = bits_per_character(self.model, self.tokenizer, self.validation).bits_per_char
            line += f"　留出对话 {entry['bits_per_char']:.3f} 比特/字"
        if self.validation:  # all processes must agree when to stop
            entry["bits_per_char"] = self.group.from_first([entry.get("bits_per_char", 0.0)], self.device)[0]
        self.history.append(entry)
        self.recent = [0.0, 0]
        if self.group.rank > 0:
            return ""
        if log:
            if self.validation:
                bits = entry["bits_per_char"]
                log.measurement(step=self.steps, epoch=self.epoch, seconds=round(self.seconds, 3), bits_per_char=bits)
            progress = self.steps / self.total_steps
            if progress >= SAMPLE_STAGES[self.stages] and progress < 1:
                self._samples(log)
        self.save()
        return f"{line}　已保存到 {self.config.out}"

    def _samples(self, log: RunLog) -> None:
        self.stages += 1
        generator = Generator(self.model, self.tokenizer, "float32", max_running=1)
        sampling = SamplingConfig(seed=self.config.seed)
        replies = [
            (prompt, generator.reply([{"role": "user", "content": prompt}], sampling))
            for prompt in PROMPTS
            if len(prompt) < self.model.config.max_length // 2
        ]
        log.samples(step=self.steps, stage=self.stages, replies=replies)

    def _finish(self, log: RunLog | None) -> None:
        if self.group.rank == 0:
            if self._worse() > 0:
                best, _ = load_folder(self.config.out, self.device)
                self.model.load_state_dict(best.state_dict())
            self.stages = len(SAMPLE_STAGES) - 1
            # A run that was killed from here on comes here again.
            if log and not any(line["stage"] == len(SAMPLE_STAGES) for line in read_samples(self.config.out)):
                self._samples(log)
            self._save_model(finished=True)
            delete_snapshots(self.config.out)  # nothing is left to go on with
        self.group.wait()

    # Saving and going on.

    def save(self) -> Path:
        """Saves the exact state of the run and, unless an earlier one was better, the model folder; the model can be
        chatted with while training goes on."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizers)
        names = (
            "steps", "epoch", "groups_done", "seconds", "tokens", "total_steps", "history", "recent", "bad_steps",
            "depth", "stages", "amp", "facts", "logged", "unlogged", "corpus_sha256",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        values |= {"config": self._settings(), "vocab_sha256": self.tokenizer.sha256}
        save_snapshot(self.config.out, Snapshot(tensors, values), self.steps)
        # Between two measurements nobody knows whether the weights are better than the best ones in the folder.
        unknown = self.validation and self.history and self.history[-1]["step"] < self.steps
        return self._save_model() if self._worse() == 0 and not unknown else Path(self.config.out)

    def _save_model(self, finished: bool = False) -> Path:
        training = {
            **self._settings(),
            "epoch": self.epoch,
            "steps": self.steps,
            "history": self.history,
            "finished": finished,
        }
        dtype = torch.bfloat16 if self.config.half else torch.float32
        return save_checkpoint(self.config.out, self.model, self.tokenizer, training, dtype)

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.config)
        del settings["out"]  # where it lay on this machine is nobody else's business
        return settings

    def _save_and_leave(self, signals: list[int], bar: tqdm) -> None:
        if self.group.rank == 0:
            bar.write(f"收到中断，正在保存到 {self.config.out} ……")
            self.save()
            bar.write(f"已保存。接着训练：{self._how_to_resume()}")
        self.group.wait()
        if signals[:1] == [signal.SIGTERM]:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _how_to_resume(self) -> str:
        return f"python -m train --resume --out {shlex.quote(self.config.out)}"

    def _resume(self) -> None:
        snapshot, notes = load_snapshot(self.config.out)
        for note in notes:
            print(note)
        values = dict(snapshot.values)
        if values.pop("vocab_sha256") != self.tokenizer.sha256:
            raise UserError(
                f"{self.config.out} 里的训练用的是另一份语料（词表变了）；请换回原来的语料，或用 --out 重新训练。"
            )
        if values.pop("corpus_sha256", self.corpus_sha256) != self.corpus_sha256:
            raise UserError(
                f"{self.config.out} 里的训练用的是另一份语料（内容变了）；请换回原来的语料，或用 --out 重新训练。"
            )
        before, now = values.pop("config"), self._settings()
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            raise UserError(f"{self.config.out} 里的训练的设置 {'、'.join(changed)} 不同；接着训练时不能改设置。")
        for name, value in values.items():
            setattr(self, name, value)
        prefix = "model."
        weights = {n.removeprefix(prefix): v for n, v in snapshot.tensors.items() if n.startswith(prefix)}
        self.model.load_state_dict(weights)
        load_optimizers(self.optimizers, snapshot.tensors)


def _in_groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """``size`` at a time; the last group may have fewer."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


def corpus_sha256(corpus: ConvDataset) -> str:
    """Of the dialogues that are learnt from and measured on, as the run reads them."""
    digest = hashlib.sha256()
    for turns in chain(corpus.training_dialogues(), [[]], corpus.held_out_dialogues()):
        digest.update("\n".join([*turns, "\n"]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_new_run(out: str | Path) -> None:
    """Raises UserError if a new run cannot begin in ``out``: it is a file, or holds a model or a run."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} 是一个文件，不能当作模型文件夹；请用 --out 换一个名字。")
    if newest_step(out) is not None:
        raise UserError(f"{out} 里有一次没做完的训练；请加 --resume 接着训练，或用 --out 换一个文件夹。")
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} 里已经有一个模型；请用 --out 换一个文件夹，或先把它移走。")


def read_run(out: str | Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Settings and facts of the run that was begun in ``out``, to resume it.

    Raises:
        UserError: there is none, or it is over.
    """
    if newest_step(out) is None and (Path(out) / CONFIG_FILE).exists():
        if read_config(out)["training"].get("finished"):
            raise UserError(f"{out} 里的训练已经做完了；要再训练请用 --out 换一个文件夹。")
        raise UserError(f"{out} 里只有模型，没有训练的状态，不能接着训练；请用 --out 换一个文件夹重新训练。")
    # To lock a folder is to make it. Of several processes the first locks for all: the others would keep it out.
    first = newest_step(out) is not None and int(os.environ.get("RANK", 0)) == 0
    with locked(out) if first else contextlib.nullcontext():
        snapshot, notes = load_snapshot(out)
    for note in notes:  # not said again: what is damaged is put aside
        print(note)
    return TrainConfig.from_mapping({**snapshot.values["config"], "out": str(out)}), snapshot.values["facts"]
