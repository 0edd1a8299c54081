"""Create a ladder from models of diffusers, to which the ladder refers where they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pixel_unshuffle
from torch.utils.flop_counter import FlopCounterMode

from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable, file_digest, own_names, read_object, remembered_digest, replace_file
from mlem_dist.ladder.checks import check_model_folder, model_files, stored_values
from mlem_dist.ladder.gaussian_fit import FEWEST, gaussian_of_images, gaussian_of_samples
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import measure_costs
from mlem_dist.ladder.save import save_level
from mlem_dist.ladder.schema import LADDER, MODELS_VERSION, OPERATIONS, PRECISIONS, SCHEDULER, UNGUIDED, Guidance
from mlem_dist.ladder.single_file import convert
from mlem_dist.ladder.sources import Source, find_file, find_folder, find_source, stored_path
from mlem_dist.models.decoder import DECODERS, upscaling
from mlem_dist.models.devices import default_device
from mlem_dist.models.encoder import ENCODERS, encoder_files, encoder_shapes
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.guidance import GUIDANCE
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.models.level import placeholder
from mlem_dist.models.safety import CHECKER, KIND, checker_files
from mlem_dist.models.weights import QUANTISED
from mlem_dist.solver.condition import LABEL
from mlem_dist.solver.process import BetaProcess, Process, process_of

GAUSSIAN = "gaussian"
"""Name of the Gaussian level of a new ladder."""

MODELS = "models"
"""Name of the folder of models in a ladder's folder."""


@dataclass(frozen=True)
class Entry:
    """A model of the new ladder: its source, name, prediction, precision, and operations of an evaluation."""

    source: Source
    name: str
    prediction: str
    precision: str
    operations: float


def create_ladder(
    out: Path,
    models: Sequence[str | Path],
    *,
    pipeline: str | Path | None = None,
    guidance: float | Sequence[float] | None = None,
    unguided: bool = True,
    guide_with: str | Path | None = None,
    true_guidance: float | None = None,
    precision: str | Sequence[str] = "float32",
    size: tuple[int, int] | None = None,
    gaussian: str | Path | int | GaussianLevel | None = None,
    prompts: Sequence[str] = (),
    copy: bool = False,
    measure: bool = True,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Ladder:
    """Write a ladder folder that refers to models, and return the ladder.

    Args:
        out: the new ladder's folder.
        models: folders of pipelines or of models, their URLs or ids on the hub, or checkpoints in single .safetensors
            files, which are converted into the ladder's folder.
        pipeline: folder, URL or id of the pipeline whose scheduler, decoder and text encoders the ladder takes; by
            default that of the last model.
        guidance: guidance scale of a further level of each model, or (scale, start, stop) for guidance from `start` to
            `stop` only, as parts of the noise schedule from 0, pure noise, to 1, the image; None for no guidance. A
            model that takes the scale as an input has one level, by default with the scale of its pipeline.
        unguided: whether models with a guided level also have an unguided one.
        guide_with: the one of `models` that gives the direction of guidance to all others, too.
        true_guidance: scale of guidance by two evaluations of models that need none (FLUX): their pipeline's
            `true_cfg_scale`, for a further level of each.
        precision: dtype in which models compute, for all or for each: "float32", "bfloat16" or "float16".
        size: height and width of the images in pixels; by default those for which the last model was trained.
        gaussian: a Gaussian as the first level, or one fitted to the images in a folder, or to this number of samples
            of the best level; None for none.
        prompts: prompts of those samples, some hundred, for a ladder that is conditioned on prompts.
        copy: whether to copy models, decoder and text encoders into the ladder's folder, instead of referring to them.
        measure: whether to measure the costs of levels on this machine, instead of counting their operations.
        notify: receives sentences for the user.

    Raises:
        UsageError: if a model cannot be used, or does not fit the others. Nothing is written in this case.
    """
    guide = _guidance(guidance)
    if true_guidance is not None and not 1 < true_guidance < math.inf:
        raise UsageError(f"`true_guidance` {true_guidance}: expected a scale above 1; leave it out for none")
    _check_gaussian(gaussian, prompts)
    _check_out(out)
    if not models:
        raise UsageError("`models` is empty, expected at least one model")
    precisions = _precisions(precision, len(models))
    texts = [*map(str, models)]
    files = [text for text in dict.fromkeys(reversed(texts)) if find_file(text)]
    known = {text: find_source(text) for text in texts if text not in files}
    around = _surroundings(known.get(texts[-1]), pipeline)
    with ExitStack() as stack:
        work = Path(stack.enter_context(_work_folder(out))).resolve() if files else None
        # The last model comes first: others take the pipeline around it.
        for text in files:
            assert work
            known[text] = _converted(text, out, work, around, notify)
            if known[text].pipeline:
                around = _surroundings(known[text], None)
        assert around
        if around.encoder and isinstance(gaussian, int) and not prompts:
            raise UsageError(f"`gaussian` {gaussian}: samples need prompts; give some hundred as `prompts`")
        sources = [known[text] for text in texts]
        by = _guide(guide_with, guide, models, _names(sources))
        shape = _sample_shape(sources[-1], around, size)
        labels = _labels(sources[-1], around)
        entries = _entries(sources, precisions, around, shape, labels, guide, by)
        if true_guidance is not None and (others := [entry.name for entry in entries if entry.source.family.guided]):
            raise UsageError(
                f"`true_guidance` {true_guidance:g}: it is for models of FLUX; {others[0]} takes `guidance`"
            )
        raw = _content(out, entries, around, shape, labels, guide, true_guidance, unguided, by)
        fitted = None if gaussian is None else _fitted(gaussian, raw, around, prompts, notify)
        if copy:
            _copy(out, raw, entries, around)
        elif work:
            _move(out, raw, work)
        if fitted:
            _add_gaussian(out, raw, fitted)
        ladder = _write(out, raw, around)
    if not measure:
        notify(
            "Levels are in the order of their operations per image; `mlem-dist ladder measure` measures their costs."
        )
        return ladder
    notify(f"Measuring the costs of {len(ladder.levels)} levels on this machine.")
    ladder = sorted_by_cost(measure_costs(ladder))
    devices = " and ".join(sorted(ladder.levels[0].seconds.keys() - {OPERATIONS}))
    notify(f"Levels are in the order of their costs, measured on this machine ({devices}).")
    return ladder


def _entries(
    sources: Sequence[Source],
    precisions: Sequence[str],
    around: Surroundings,
    shape: tuple[int, int, int],
    labels: Sequence[str],
    guidance: Guidance,
    by: str,
) -> list[Entry]:
    """The models of the new ladder, after a check that each fits it."""
    entries = []
    for source, name, dtype in zip(sources, _names(sources), precisions, strict=True):
        prediction = _prediction(source, around)
        check_fit(source, around, shape, len(labels), sources[-1])
        if guidance != UNGUIDED:
            _check_guided(source, sources[-1], around, len(labels), replace(guidance, by=by))
        entries.append(Entry(source, name, prediction, dtype, _operations(source, shape)))
    return entries


def _check_guided(source: Source, last: Source, around: Surroundings, classes: int, guidance: Guidance) -> None:
    """Refuse guidance that a model does not take.

    Models that take none stay as they are below a last model that takes the scale as an input.
    """
    family, reason = source.family, ""
    if family.scale(source.config) is not None:
        if guidance != Guidance(guidance.scale):
            reason = "takes the scale as an input; give it alone, without an interval and `guide_with`"
    elif not family.guided:
        if last.family.scale(last.config) is None:
            reason = "takes no guidance, as it was distilled to need none; leave it out"
    elif not around.encoder and not family.has_null(source.config, classes):
        reason = "was not trained without its condition, which guidance needs; leave it out"
    if reason:
        raise UsageError(f"`guidance`: {source.text} {reason}")


def _work_folder(out: Path) -> TemporaryDirectory[str]:
    """A temporary folder on the file system of the new ladder's folder."""
    beside = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    return TemporaryDirectory(prefix=f".{out.name}-", dir=beside)


def _converted(text: str, out: Path, work: Path, around: Surroundings | None, notify: Callable[[str], None]) -> Source:
    """The model of a checkpoint in a single file, converted to a folder in `work`.

    The pipeline of the file is converted, too, unless there is one around the model that it can take.
    """
    stem = Path(text).stem
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    folder = next(folder for name in names if not (folder := work / MODELS / name).exists())
    notify(f"Converting {text} to {out / MODELS / folder.name}.")
    source = find_source(text, convert(text, folder, around.folder if around else None))
    return replace(source, name=folder.name)


def _move(out: Path, raw: dict[str, Any], work: Path) -> None:
    """Move converted models into the new ladder's folder, and let the entries of `raw` refer to them there."""
    out.mkdir(parents=True, exist_ok=True)
    (work / MODELS).rename(out / MODELS)
    for stored in filter(None, (*raw["models"], raw["decoder"], raw["encoder"], raw.get("checker"))):
        if Path(stored["path"]).is_relative_to(work):
            stored["path"] = str(Path(stored["path"]).relative_to(work))


def _write(out: Path, raw: dict[str, Any], around: Surroundings) -> Ladder:
    replace_file(out / SCHEDULER, json.dumps(around.scheduler, indent=2) + "\n")
    raw["scheduler_sha256"] = file_digest(out / SCHEDULER)
    replace_file(out / LADDER, json.dumps(raw, indent=2) + "\n")
    return Ladder.load(out)


def _fitted(
    gaussian: str | Path | int | GaussianLevel,
    raw: dict[str, Any],
    around: Surroundings,
    prompts: Sequence[str],
    notify: Callable[[str], None],
) -> GaussianLevel:
    """A Gaussian level for the ladder of the content `raw`, which is not written yet."""
    if isinstance(gaussian, GaussianLevel):
        return gaussian
    with TemporaryDirectory() as work:
        ladder = replace(_write(Path(work), raw, around), prompts=tuple(prompts))
        if isinstance(gaussian, int):
            return gaussian_of_samples(ladder, gaussian, notify)
        return gaussian_of_images(ladder, Path(gaussian), notify)


def _add_gaussian(out: Path, raw: dict[str, Any], level: GaussianLevel) -> None:
    """Write a Gaussian level to the new ladder's folder, and put its entries first in `raw`."""
    entry = save_level(out, GAUSSIAN, level, torch.float32)
    stored = {"kind": entry.kind, "path": entry.path, "sha256": entry.sha256, "parameters": entry.parameters}
    raw["models"].insert(0, {"name": GAUSSIAN, **stored})
    d, rank = level.basis.shape[1:]
    raw["levels"].insert(0, _level(GAUSSIAN, GAUSSIAN, 4.0 * d * rank))


class Surroundings:
    """Scheduler, decoder and text encoders of a pipeline, around its models.

    Args:
        folder: the pipeline's folder, as `save_pretrained` writes it.
        pinned: its path on the hub, or its URL in a store; "" if it is on this machine.

    Raises:
        UsageError: if a part cannot be used.
    """

    def __init__(self, folder: Path, pinned: str = "") -> None:
        self.folder, self.pinned = folder, pinned
        # A ladder's folder has a scheduler, and the names of its classes.
        self.ladder = read_object(folder / LADDER, "ladder") if (folder / LADDER).is_file() else {}
        self.index = {} if self.ladder else read_object(folder / "model_index.json", "pipeline")
        self.kind = str(self.index.get("_class_name"))
        self.scheduler = read_object(folder / SCHEDULER, "noise schedule")
        try:
            # A dynamic shift decides grids, of which there are none here.
            self.process: Process = process_of(self.scheduler, tokens=1)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{folder / SCHEDULER}: {error}") from None
        self.decoder = folder / "vae" if self._has("vae") else None
        self.decoder_config: Mapping[str, Any] = {}
        if self.decoder:
            self.decoder_config = read_object(self.decoder / "config.json", "decoder's configuration")
            if (kind := self.decoder_config.get("_class_name")) not in DECODERS:
                raise UsageError(f"{self.decoder}: its class is {kind!r}, expected {' or '.join(DECODERS)}")
            check_model_folder(f"decoder {self.decoder}", str(kind), self.decoder)
        self.encoder = any(key.startswith("text_encoder") for key in self.index)
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        if self.encoder:
            if self.kind not in ENCODERS:
                raise UsageError(f"{folder}: it is a {self.kind}, expected one of {', '.join(ENCODERS)}")
            self.shapes = encoder_shapes(folder, self.kind)

    def _has(self, name: str) -> bool:
        value = self.index.get(name)
        return isinstance(value, list) and value[1] is not None

    @property
    def upscaling(self) -> int:
        """The ratio of the height of an image to that of a sample."""
        return upscaling(self.decoder_config) if self.decoder else 1

    def decoder_entry(self) -> dict[str, Any] | None:
        """The decoder's entry in `ladder.json`."""
        if self.decoder is None:
            return None
        path = stored_path(self.decoder, self.folder, self.pinned)
        return _entry(self.decoder, path, str(self.decoder_config["_class_name"]), model_files(self.decoder))

    def encoder_entry(self) -> dict[str, Any] | None:
        """The encoder's entry in `ladder.json`."""
        if not self.encoder:
            return None
        path = stored_path(self.folder, self.folder, self.pinned)
        return _entry(self.folder, path, self.kind, encoder_files(self.folder))

    def checker_entry(self) -> dict[str, Any] | None:
        """The safety checker's entry in `ladder.json`."""
        if not self._has(CHECKER):
            return None
        path = stored_path(self.folder, self.folder, self.pinned)
        return _entry(self.folder, path, KIND, checker_files(self.folder))


def _entry(folder: Path, path: str, kind: str, names: Sequence[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "path": path,
        "sha256": {name: remembered_digest(folder / name) for name in names},
        "parameters": stored_values(folder / name for name in names if name.endswith(".safetensors")),
    }


def _guidance(values: float | Sequence[float] | None) -> Guidance:
    """The guidance of a scale, or of (scale, start, stop).

    Raises:
        UsageError: if the scale is not above 1, or the interval is empty or exceeds 0 to 1.
    """
    if values is None:
        return UNGUIDED
    numbers = [float(value) for value in ([values] if isinstance(values, int | float) else values)]
    given = ",".join(f"{number:g}" for number in numbers)
    if len(numbers) not in (1, 3) or not 1 < numbers[0] < math.inf:
        raise UsageError(f"`guidance` {given}: expected a scale above 1, or SCALE,START,STOP; leave it out for none")
    scale, start, stop = numbers if len(numbers) == 3 else (*numbers, 0.0, 1.0)
    guidance = Guidance(scale, start, stop)
    if not 0 <= guidance.start < guidance.stop <= 1:
        raise UsageError(f"`guidance` {given}: expected a start and a stop from 0, pure noise, to 1, the image")
    return guidance


def _precisions(precision: str | Sequence[str], models: int) -> list[str]:
    each = [precision] * models if isinstance(precision, str) else list(precision)
    if len(each) != models:
        raise UsageError(f"`precision`: {len(each)} for {models} models, expected one for all or one for each")
    if bad := [name for name in each if name not in PRECISIONS]:
        raise UsageError(f"`precision` {bad[0]!r}: expected {', '.join(PRECISIONS)}")
    return each


def _guide(
    guide_with: str | Path | None, guidance: Guidance, models: Sequence[str | Path], names: Sequence[str]
) -> str:
    """The name of the model that gives the direction to all; "" if each model gives its own."""
    if guide_with is None:
        return ""
    if guidance == UNGUIDED:
        raise UsageError(f"`guide_with` {guide_with}: no level is guided; give `guidance`, or leave it out")
    given = [*map(str, models)]
    if str(guide_with) not in (*given, *names):
        raise UsageError(f"`guide_with` {guide_with}: expected one of the models, {', '.join(names)}")
    return names[given.index(str(guide_with))] if str(guide_with) in given else str(guide_with)


def _copy(out: Path, raw: dict[str, Any], entries: Sequence[Entry], around: Surroundings) -> None:
    """Copy what the entries of `raw` refer to into the new ladder's folder, and let them refer to the copies.

    Raises:
        OSError: if the disk is full or not writable.
    """
    places = [
        (model, entry.source.folder, f"{MODELS}/{entry.name}")
        for model, entry in zip(raw["models"], entries, strict=True)
    ]
    if around.decoder:
        places.append((raw["decoder"], around.decoder, "decoder"))
    if around.encoder:
        places.append((raw["encoder"], around.folder, "encoder"))
    if "checker" in raw:
        places.append((raw["checker"], around.folder, "checker"))
    for stored, folder, path in places:
        for name in stored["sha256"]:
            replace_file(out / path / name, partial(shutil.copyfile, folder / name))
        stored["path"] = path


def _check_gaussian(gaussian: str | Path | int | GaussianLevel | None, prompts: Sequence[str]) -> None:
    if prompts and not isinstance(gaussian, int):
        raise UsageError("`prompts` are those of samples to fit a Gaussian to; give their number as `gaussian` as well")
    if isinstance(gaussian, int):
        if gaussian < FEWEST:
            raise UsageError(
                f"`gaussian` {gaussian}: expected a folder of images, or at least {FEWEST} samples to fit to"
            )
    elif isinstance(gaussian, str | Path) and not Path(gaussian).is_dir():
        raise UsageError(f"`gaussian` {gaussian}: expected a folder of images, or a number of samples")


def _check_out(out: Path) -> None:
    check_writable(out)
    if out.is_dir() and (names := own_names(entry.name for entry in out.iterdir())):
        raise UsageError(f"`out` {out} holds something else ({', '.join(names[:5])}); choose a new or empty folder")


def _surroundings(last: Source | None, pipeline: str | Path | None) -> Surroundings | None:
    """The pipeline that is given, or that of the last model; None if that is not known yet."""
    if pipeline is not None:
        folder, pinned = find_folder(str(pipeline), "`pipeline`")
        if not (folder / "model_index.json").is_file() and not (folder / LADDER).is_file():
            raise UsageError(f"`pipeline` {pipeline}: it has no model_index.json, expected the folder of a pipeline")
        return Surroundings(folder, pinned)
    if last is None:
        return None
    if last.pipeline is None:
        raise UsageError(
            f"{last.text} is a model alone: give a pipeline as `pipeline`, from which the ladder takes the scheduler "
            "and, if there are any, decoder and text encoders"
        )
    return Surroundings(last.pipeline, last.pinned)


def _names(sources: Sequence[Source]) -> list[str]:
    names = [GAUSSIAN]
    for source in sources:
        choices = (source.name if number == 1 else f"{source.name}-{number}" for number in count(1))
        names.append(next(name for name in choices if name not in names))
    return names[1:]


def _sample_shape(source: Source, around: Surroundings, size: tuple[int, int] | None) -> tuple[int, int, int]:
    factor = around.upscaling
    if size is None:
        trained = source.family.size(source.config)
        if trained is None:
            raise UsageError(
                f"`size` is missing: the configuration of {source.text} does not say for which size it was trained"
            )
    else:
        patch = source.family.patch or 1
        if size[0] % (factor * patch) or size[1] % (factor * patch):
            times = f"{patch} times " if patch > 1 else ""
            raise UsageError(
                f"`size` {size[1]}x{size[0]}: expected multiples of {factor * patch}, {times}the decoder's upscaling"
            )
        trained = size[0] // factor // source.patch, size[1] // factor // source.patch
    channels = source.family.channels(source.config) // source.patch**2
    return channels, trained[0] * source.patch, trained[1] * source.patch


def _labels(source: Source, around: Surroundings) -> list[str]:
    """The names of the classes: those of the pipeline or ladder, if it has any, else the numbers."""
    if around.ladder:
        return [str(name) for name in around.ladder["labels"]]
    classes = source.family.classes(source.config)
    named = around.index.get("id2label") or {}
    names = [str(named.get(str(number), number)) for number in range(classes)]
    # Classes of ImageNet have a few names twice.
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _prediction(source: Source, around: Surroundings) -> str:
    """The prediction of a model, by the scheduler of its own pipeline if it has one.

    Raises:
        UsageError: if the noise schedule is another one, or the prediction cannot be converted.
    """
    process = around.process
    own = Surroundings(source.pipeline).process if source.pipeline and source.pipeline != around.folder else process
    if not _same(own, process):
        raise UsageError(
            f"{source.text}: the noise schedule of its pipeline is not that of {around.folder}; take models that were "
            "trained for the same one"
        )
    if own.prediction == "epsilon" and process.drift != "epsilon":
        raise UsageError(
            f"{source.text}: it predicts the noise, which says nothing of the image at the beginning of the noise "
            f"schedule of {around.folder}; take a model that predicts v or the image"
        )
    return source.prediction or own.prediction


def _same(one: Process, other: Process) -> bool:
    if type(one) is not type(other) or one.length != other.length:
        return False
    if isinstance(one, BetaProcess) and isinstance(other, BetaProcess):
        return bool(np.allclose(one.alpha_bar, other.alpha_bar, atol=1e-6))
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64) * one.length
    return all(torch.allclose(a, b) for a, b in zip(one.marginal(t), other.marginal(t), strict=True))


def check_fit(source: Source, around: Surroundings, shape: tuple[int, int, int], classes: int, last: Source) -> None:
    """Refuse a model that does not fit the ladder's samples, decoder or text encoders."""
    family, config = source.family, source.config
    if reason := family.refusal(config, around.process):
        raise UsageError(f"{source.text}: {reason}")
    channels = family.channels(config) // source.patch**2
    if channels != shape[0]:
        raise UsageError(f"{source.text}: its samples have {channels} channels, expected {shape[0]}, as in {last.text}")
    if shape[1] % source.patch or shape[2] % source.patch:
        raise UsageError(f"{source.text}: {shape[1]}x{shape[2]} is not divisible by its patch {source.patch}")
    if around.decoder and (latent := around.decoder_config["latent_channels"]) != channels:
        raise UsageError(
            f"{source.text}: its samples have {channels} channels, and the decoder {around.decoder} takes {latent}; "
            "take the pipeline that belongs to it"
        )
    if not around.decoder and channels not in (1, 3):
        raise UsageError(f"{source.text}: its samples have {channels} channels, expected 1 or 3 without a decoder")
    if not family.fits(config, classes):
        raise UsageError(
            f"{source.text}: it has {family.classes(config)} classes, expected {classes}, as in {last.text}"
        )
    for name, wanted in family.inputs(config).items():
        given = () if name in (LABEL, GUIDANCE) else around.shapes.get(name)
        if given is None:
            raise UsageError(f"{source.text}: it takes {name}, which the {around.kind} {around.folder} does not give")
        if len(given) != len(wanted) or any(a and b and a != b for a, b in zip(given, wanted, strict=True)):
            raise UsageError(
                f"{source.text}: it takes {name} of width {wanted[-1]}, and the text encoders of {around.folder} give "
                f"{given[-1]}; take the pipeline that belongs to it"
            )
    if source.pipeline and source.pipeline != around.folder and around.decoder:
        _check_same_decoder(source, around)


def _check_same_decoder(source: Source, around: Surroundings) -> None:
    assert source.pipeline
    assert around.decoder
    own = source.pipeline / "vae"
    digests = [[remembered_digest(path / name) for name in model_files(path)[1:]] for path in (own, around.decoder)]
    if digests[0] != digests[1]:
        raise UsageError(
            f"{source.text}: its decoder is not that of {around.folder}, so that their latents may mean different "
            f"images; if they are known to fit, give the folder {source.folder} alone"
        )


def _operations(source: Source, shape: tuple[int, int, int]) -> float:
    """Operations of an evaluation of a model for one sample, counted without weights.

    Raises:
        UsageError: if the model cannot be built, or fails on samples of this shape.
    """
    family = source.family
    try:
        with quiet_diffusers(), torch.device("meta"), torch.no_grad():
            model = family.model_class().from_config(dict(source.config))
            condition = placeholder(family.inputs(source.config), 2)
            with FlopCounterMode(display=False) as counter:
                x = pixel_unshuffle(torch.empty(2, *shape), source.patch)
                family.predict(model, x, torch.ones(2), condition)
    except Exception as error:
        size = "x".join(map(str, shape))
        raise UsageError(
            f"{source.text}: it cannot be used for samples of {size}: {' '.join(str(error).split())}"
        ) from None
    return counter.get_total_flops() / 2


def _content(
    out: Path,
    entries: Sequence[Entry],
    around: Surroundings,
    shape: tuple[int, int, int],
    labels: Sequence[str],
    guidance: Guidance,
    true_guidance: float | None,
    unguided: bool,
    by: str,
) -> dict[str, Any]:
    """The content of `ladder.json`, but for the scheduler's digest."""
    models: list[dict[str, Any]] = []
    levels: list[dict[str, Any]] = []
    for entry in entries:
        folder, quantised = entry.source.folder, {}
        names, path = model_files(folder), entry.source.path(folder)
        if QUANTISED in entry.source.config:
            sizes = [(folder / name).stat().st_size for name in names if name.endswith(".safetensors")]
            quantised = {"quantised_bytes": sum(sizes)}
        models.append(
            {
                "name": entry.name,
                **_entry(folder, path, entry.source.family.names[0], names),
                **quantised,
                "prediction": entry.prediction,
                "patch": entry.source.patch,
                "precision": entry.precision,
            }
        )
        family, alone = entry.source.family, _level(entry.name, entry.name, entry.operations)
        embedded, guided = None, []
        if (scale := family.scale(entry.source.config)) is not None:
            embedded = Guidance(scale if guidance == UNGUIDED else guidance.scale, embedded=True)
            alone |= {"guidance": asdict(embedded)}
        if true_guidance:
            true = replace(embedded, weight=true_guidance) if embedded else Guidance(true_guidance)
            level = _level(f"{entry.name} guided", entry.name, 2 * entry.operations)
            guided = [level | {"guidance": asdict(true)}]
        elif guidance != UNGUIDED and family.guided:
            guided = _guided(entry, entries, guidance, by)
        levels += [alone] * (unguided or not guided) + guided
    levels.sort(key=lambda level: level["seconds"][OPERATIONS])
    return {
        "schema_version": MODELS_VERSION,
        "name": out.absolute().name,
        "sample_shape": list(shape),
        "value_range": [-1.0, 1.0],
        "labels": list(labels),
        "parametrisation": around.process.drift,
        "decoder": around.decoder_entry(),
        "encoder": around.encoder_entry(),
        **({"checker": checker} if (checker := around.checker_entry()) else {}),
        "models": models,
        "levels": levels,
    }


def _guided(entry: Entry, entries: Sequence[Entry], guidance: Guidance, by: str) -> list[dict[str, Any]]:
    """The levels of a model with guidance: by the model `by`, or by its own evaluations.

    In the latter case there is also a level that is guided by the smallest model, if that takes less than half of the
    time. It lies between the model's unguided and guided levels, so that increments are small.
    """
    smallest = min(entries, key=lambda other: other.operations)
    guides = [other for other in entries if other.name == by and by != entry.name]
    own = not guides
    if own and not by and 2 * smallest.operations < entry.operations:
        guides = [smallest]
    levels = [
        _level(f"{entry.name} guided by {guide.name}", entry.name, entry.operations + 2 * guide.operations)
        | {"guidance": asdict(replace(guidance, by=guide.name))}
        for guide in guides
    ]
    if own:
        level = _level(f"{entry.name} guided", entry.name, 2 * entry.operations)
        levels.append(level | {"guidance": asdict(guidance)})
    return levels


def _level(name: str, model: str, operations: float) -> dict[str, Any]:
    return {"name": name, "model": model, "seconds": {OPERATIONS: operations / 1e12}}


def sorted_by_cost(ladder: Ladder) -> Ladder:
    """The ladder with its levels in the order of their costs on this machine, after a change of `ladder.json`.

    The best level stays the last one.
    """
    raw = read_object(ladder.folder / LADDER, "ladder")
    device = default_device()
    before = raw["levels"]
    raw["levels"] = [*sorted(before[:-1], key=lambda level: level["seconds"][device]), before[-1]]
    if raw["levels"] != before:
        replace_file(ladder.folder / LADDER, json.dumps(raw, indent=2) + "\n")
    return Ladder.load(ladder.folder)
