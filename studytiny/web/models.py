"""The models the page offers: the bundled one at once, StudyTinyModel when it has arrived, and folders under runs/.

One ``ModelShelf`` serves all visitors: every model is loaded once and shared.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from studytiny import hub
from studytiny.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from studytiny.errors import UserError, describe_os_error
from studytiny.generator import Generator
from studytiny.web.texts import explain, text

BUNDLED, PUBLISHED = "bundled", "StudyTinyModel"
RUNS_FOLDER = Path("runs")  # where `python -m train` puts its results; relative to where the page was started
_MAX_RUNS = 50


@dataclass(frozen=True)
class Download:
    """How far StudyTinyModel has come: ``idle``, ``running``, ``ready`` or ``failed``; sizes in bytes."""

    state: str = "idle"
    done: int = 0
    total: int = 0
    error: UserError | None = None


class ModelShelf:
    """What can be chosen, and a Generator for each choice."""

    def __init__(self, runs_folder: Path = RUNS_FOLDER) -> None:
        self._runs_folder = runs_folder
        self._published: Path | None = None
        self._download = Download()
        self._generators: dict[str, tuple[object, Generator]] = {}
        self._lock = threading.Lock()  # of the fields above
        self._loading = threading.Lock()  # one model is read at a time; visitors of a loaded one need not wait

    # what can be chosen

    def names(self) -> list[str]:
        """Names of the models that can answer now, the bundled one first."""
        published = [PUBLISHED] if self._published else []
        return [BUNDLED, *published, *self._run_names()]

    def _run_names(self) -> list[str]:
        try:
            folders = [path for path in self._runs_folder.iterdir() if (path / CONFIG_FILE).is_file()]
        except OSError:  # there is no such folder, which is the usual case
            return []
        return [f"runs/{path.name}" for path in sorted(folders)[:_MAX_RUNS]]

    def generator(self, name: object) -> Generator:
        """The generator of the model called ``name``, loaded on first use.

        Raises:
            UserError: no such model is offered, or its folder is damaged.
        """
        # Only names that the page offers are looked up: a client's text never becomes a path.
        if not isinstance(name, str) or name not in self.names():
            raise UnknownModel(str(name)[:80])
        try:
            return self._load(name)
        except OSError as error:
            raise UserError(describe_os_error(error)) from error

    def _load(self, name: str) -> Generator:
        if name == BUNDLED:
            source: str | Path = BUNDLED
            version = None
        else:
            source = self._published if name == PUBLISHED else self._runs_folder / name.removeprefix("runs/")
            version = (Path(source) / WEIGHTS_FILE).stat().st_mtime_ns  # a run may still be training
        with self._loading:
            known = self._generators.get(name)
            if known is None or known[0] != version:
                model, tokenizer = hub.load_model(source, "auto")
                known = self._generators[name] = (version, Generator(model, tokenizer))
        return known[1]

    # the download

    @property
    def download(self) -> Download:
        return self._download

    def start_download(self) -> None:
        """Fetches StudyTinyModel in the background, unless it is here, on its way, or failed before (see ``retry``)."""
        with self._lock:
            if self._download.state != "idle":
                return
            self._download = Download("running")
        threading.Thread(target=self._fetch, name="download of StudyTinyModel", daemon=True).start()

    def retry_download(self) -> None:
        """Tries again after a failure."""
        with self._lock:
            if self._download.state == "failed":
                self._download = Download()
        self.start_download()

    def _fetch(self) -> None:
        def report(done: int, total: int) -> None:
            self._download = Download("running", done, total)

        try:
            self._published = hub.fetch_published(report)
            self._download = Download("ready")
        except UserError as error:
            self._download = Download("failed", error=error)
        except OSError as error:
            self._download = Download("failed", error=UserError(describe_os_error(error)))


class UnknownModel(UserError):
    """A name that the page does not offer."""

    def __init__(self, name: str) -> None:
        super().__init__(text("unknown_model", "zh", name=name))
        self.name = name


def label_of(name: str, language: str) -> str:
    """How a model is called in the list."""
    if name == BUNDLED:
        return text("model_bundled", language)
    if name == PUBLISHED:
        return text("model_published", language)
    return text("model_run", language, name=str(name).removeprefix("runs/"))  # a client may send anything


def describe_model(shelf: ModelShelf, name: str, language: str) -> str:
    """One line: which architecture answers and what that means, or why the model cannot."""
    try:
        return text(f"note_{shelf.generator(name).model.architecture}", language)
    except UserError as error:
        return explain(error, language)


def status_line(model: str, language: str, speed: float | None = None) -> str:
    """The quiet line under the chat: which model answers, and how many characters a second it wrote last."""
    said = text("answering", language, model=label_of(model, language))
    if speed is not None:
        said += text("speed", language, speed=speed)
    return f"{said} {text('caution', language)}"


def describe_download(download: Download, language: str) -> tuple[str, float | None]:
    """``(sentence, percent)``; an empty sentence when there is nothing to tell, no percent when it is unknown."""
    if download.state == "ready":
        return text("download_ready", language), None
    if download.state == "failed":
        return text("download_failed", language), None
    if download.state == "idle":
        return "", None
    if not download.total:
        return text("download_connecting", language), None
    if download.done >= download.total:
        return text("download_converting", language), 100.0
    percent = 100 * download.done / download.total
    megabytes = {"done": download.done / 1e6, "total": download.total / 1e6}
    return text("download_running", language, percent=int(percent), **megabytes), percent


def describe_failure(error: UserError, language: str) -> str:
    """Why StudyTinyModel cannot be had, and how to bring it by hand so that this page offers it."""
    reason = error.reason if isinstance(error, hub.ModelUnavailable) else str(error).rstrip("。")
    if language != "zh":
        english = {hub.REASONS[name]: said for name, said in _ENGLISH_REASONS.items() if name in hub.REASONS}
        stalled = re.fullmatch(r"(\d+) 秒没有收到任何数据.*", reason)
        reason = f"ModelScope sent nothing for {stalled[1]} seconds" if stalled else english.get(reason, reason)
    return text("download_failed_more", language, reason=reason, page=hub.MODEL_PAGE)


# hub.REASONS in English
_ENGLISH_REASONS = {
    "FileIntegrityError": "The downloaded file is not the one that ModelScope lists (wrong size or checksum)",
    "NotExistError": "ModelScope has no such model or file",
    "AuthenticationError": "ModelScope asks for a login",
    "PermissionDeniedError": "ModelScope denied access",
    "RateLimitError": "ModelScope limits downloads at the moment; try again later",
    "ServerError": "ModelScope's server has a problem; try again later",
    "RequestTimeoutError": "ModelScope does not answer; check the network",
    "NetworkError": "ModelScope cannot be reached; check the network",
    "ImportError": "modelscope-hub is not installed; run pip install modelscope-hub",
    "JSONDecodeError": "ModelScope's answer makes no sense; the network may ask for a login first",
}
