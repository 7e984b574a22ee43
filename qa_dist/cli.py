"""The command line: `qa-dist COMMAND …`, or `accelerate launch … -m qa_dist COMMAND …` on many processes."""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import tyro

from qa_dist import __version__, checks, scoring
from qa_dist.config import RunConfig
from qa_dist.config_sources import (
    Problem,
    Source,
    from_flags,
    from_yaml,
    leaves,
    reference,
    resolve,
    settings_file,
    to_yaml,
)
from qa_dist.errors import TrainingError, UserError
from qa_dist.launch_directory import LaunchDirectory, conclude
from qa_dist.reporting.run_name import default_name, model_directory

if TYPE_CHECKING:  # heavy imports wait until they are needed
    from qa_dist.training.launch_environment import LaunchEnvironment
    from qa_dist.training.resume import Resume

COMMANDS = {
    "train": "Fine-tune a model and evaluate it after every epoch.",
    "launch": "Start train, evaluate, predict or doctor on all GPUs of this machine, or of a SLURM job: launch train …",
    "evaluate": "Score a trained model: --model DIR --data.validation_file FILE [--run.output_dir DIR].",
    "predict": "Answer questions, or find entities: --model DIR --data.validation_file FILE [--run.output_dir DIR].",
    "answer": "Answer a question from a text, or a file of questions: --model DIR --question TEXT --context_file FILE.",
    "tag": "Find the entities in a text, or in a file of texts: --model DIR --text_file FILE.",
    "serve": "Serve a page to ask a model on: --model DIR.",
    "report": "Make one HTML page of a run's curves, figures and examples: report RUN [--compare OTHER_RUN].",
    "score": "Score a file of predictions as the official script does: --predictions FILE --data.validation_file FILE.",
    "prepare": "Read the data, show what is in them, and fill the cache, so that training starts at once.",
    "doctor": "Look at this machine and this launch: what is wrong, and with --model NAME what a model needs.",
    "checkpoint list": "Show a run's checkpoints: checkpoint list RUN.",
    "checkpoint verify": "Compare every file of a run's checkpoints with its hash: checkpoint verify RUN.",
    "checkpoint export": "Make a model of a checkpoint: checkpoint export RUN/checkpoints/STEP DIR [--dtype bfloat16].",
    "hub check": "Look at hub.repo_id and what the token may do there, without changing anything.",
    "hub push": "Push what a run has left to hub.repo_id, and wait for it: hub push RUN.",
    "config get": "Print one setting: config get run.output_dir --config FILE.",
    "config show": "Print the complete settings as YAML, without starting anything.",
    "config reference": "Print a table of all settings.",
}

TRAIN_OPTIONS = {
    "resume": "auto: go on from the newest complete checkpoint in run.output_dir or, where there is none or an older "
    "one, in hub.repo_id, or start; hub: from the newest in hub.repo_id, hub:user/name or hub:user/name@revision: in "
    "that repository; a path: from that checkpoint, or that run's newest; none (default): start.",
    "allow_changed": "Settings, separated by commas, that may differ from those of the resumed checkpoint.",
}

USAGE = """usage: qa-dist COMMAND [--config FILE] [--section.key VALUE ...]

{commands}

qa-dist COMMAND --help lists every setting. To use several processes, start the same command with Accelerate:
  accelerate launch --config_file configs/accelerate/cpu_zero2.yaml -m qa_dist train --config configs/demo.yaml
"""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code: 0 done, 1 failed, 2 the user has to mend something, 3 done
    but not pushed, 75 stopped at a time limit, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if args is None else args)
    _make_streams_writable()
    try:
        sys.exit(_dispatch(arguments))
    except KeyboardInterrupt:
        conclude(130, "interrupted")
        _tell("qa-dist: interrupted")
        sys.exit(130)
    except UserError as error:
        conclude(error.exit_code, str(error))
        if LaunchDirectory.of_this_process() is None:  # else the launcher says it, once
            _tell_the_reason(f"qa-dist: {error}")
        sys.exit(error.exit_code)


def _make_streams_writable() -> None:
    """Whatever they were closed or set to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 -- for good
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # which is what JSON calls such characters, too


def _show(text: str) -> None:
    """Print what was asked for."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        raise UserError(f"standard output: cannot be written: {error.strerror}") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(message: str) -> None:
    """Say it once on every node: what is wrong may be wrong on one of them alone."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if local_rank == 0:
        print(f"[{socket.gethostname()}] {message}" if rank else message, file=sys.stderr, flush=True)


def _tell_the_reason(message: str) -> None:
    """`_tell`, by the first process of the node, or by this one if its reason is its own.

    Launchers end all processes when the first one ends. So the others wait: if it is an error of all of them they do
    not come to speak.
    """
    _tell(message)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
        print(f"[{socket.gethostname()}, rank {os.environ.get('RANK')}] {message}", file=sys.stderr, flush=True)


def _dispatch(args: list[str]) -> int:
    command = args.pop(0) if args and not args[0].startswith("-") else ""
    if command in ("config", "checkpoint", "hub") and args and not args[0].startswith("-"):
        command += f" {args.pop(0)}"
    if command not in COMMANDS:
        asked_for_help = not command and args and args[0] in ("-h", "--help")
        if not command and args == ["--version"]:
            print(__version__)
            return 0
        usage = USAGE.format(commands="\n".join(f"  {name:<17} {text}" for name, text in COMMANDS.items()))
        print(usage, file=sys.stdout if asked_for_help else sys.stderr)
        if command:
            print(f"qa-dist: there is no command {command!r}", file=sys.stderr)
        return 0 if asked_for_help else 2

    if command == "config reference":
        print(reference(), end="")
        return 0
    if command == "launch":
        from qa_dist.launching.command import launch

        return launch(args, _settings_of, show=print, say=_say)
    if command in ("answer", "tag", "serve"):
        from qa_dist.inference import commands

        return getattr(commands, command)(args, show=_show, say=_say)
    if command == "report":
        return _report(args)
    if command.startswith("checkpoint "):
        from qa_dist.training import checkpoint_commands

        return checkpoint_commands.run(command, args, COMMANDS[command], show=_show, say=_say)
    if command == "hub push":
        return _push(args)
    if command == "config get":
        return _get(args)
    sources, options = _read(command, args)
    if command == "config show":
        print(to_yaml(resolve(sources, [checks.combinations])), end="")
        return 0
    if command == "hub check":
        from qa_dist.training import hub_commands

        return hub_commands.check(resolve(sources, [checks.hub_rules]), lambda text: print(text, flush=True))
    if command == "score":
        return _score(resolve(sources, [checks.paths, checks.needs_validation, checks.combinations]), options)
    return _run(command, sources, options)


def _get(args: list[str]) -> int:
    key = args.pop(0) if args else ""
    value: object = _settings_of(["config show", *args])
    for name in key.split("."):
        if name not in getattr(type(value), "model_fields", {}):
            raise UserError(f"config get: there is no setting {key!r}")
        value = getattr(value, name)
    if value is not None:
        print(value)
    return 0


def _read(command: str, args: list[str]) -> tuple[list[Source], dict[str, str | None]]:
    """The settings that `args` give, and the command's own options."""
    own = {"score": scoring.OPTIONS, "train": TRAIN_OPTIONS, "config show": TRAIN_OPTIONS}
    extra = {"config": "YAML file with settings, or the name of one in configs/, such as demo."} | own.get(command, {})
    flags, options = from_flags(args, f"qa-dist {command}", COMMANDS[command], extra)
    config_file = options["config"]
    sources = [*([from_yaml(settings_file(config_file))] if config_file else []), flags]
    return [default_name(command, config_file, sources), *sources], options


def _settings_of(program: Sequence[str]) -> RunConfig:
    """Those of a command and its arguments."""
    sources, _ = _read(program[0], list(program[1:]))
    return resolve(sources)


def _run(command: str, sources: list[Source], options: dict[str, str | None]) -> int:
    """Check everything that can be checked before the first process group, then train or evaluate."""
    # Heavy imports only now: `--help` and `config show` need none of them.
    from qa_dist.training.launch_environment import LaunchEnvironment

    launch = LaunchEnvironment.read()
    launch.announce()
    from qa_dist.reporting.run_directory import StoppedError
    from qa_dist.training import session
    from qa_dist.training.export import exported_settings
    from qa_dist.training.resume import Resume

    if command == "doctor":
        from qa_dist import doctor

        return doctor.examine(resolve(sources), launch)
    if command == "prepare":
        return _prepare(resolve(sources, [checks.paths, *checks.FOR_COMMAND["train"]]))
    stored = None
    allow_changed = tuple(name for name in (options.get("allow_changed") or "").split(",") if name)
    resume = Resume(options.get("resume") or "none", allow_changed)

    if command in ("evaluate", "predict") and (model := _model_name(sources)):
        model = model_directory(model)
        exported = exported_settings(model, with_findings=command == "predict")
        trained = Source()
        trained.put("model.name", model, "--model")
        trained.put("model.config", None, model)  # the config file may be the one that the model was trained with
        sources = [exported, *sources, trained]
        stored = exported.values.get("task")
    to_check = [
        partial(_task_is_the_models, stored),
        launch.problems,
        partial(_output_dir_is_free, launch, resume, command),
        partial(_changes_are_settings, allow_changed),
        partial(_resume_is_possible, resume),
    ]
    if command == "train":
        to_check.append(launch.training_problems)
    if not any(problem.keys == () for source in sources for problem in source.problems):
        # what a file that cannot be read might have set is not "missing"
        to_check += [checks.paths if command == "train" else checks.validation_paths, *checks.FOR_COMMAND[command]]
    config = resolve(sources, to_check)
    try:
        if command == "train":
            with _resumable(launch, config.output_dir):
                session.train(config, launch, resume)
        else:
            session.evaluate_only(config, launch, "unlabelled" if command == "predict" else "validation")
    except StoppedError as stop:
        _tell(f"qa-dist: {stop}")
        conclude(stop.exit_code, str(stop))
        if LaunchDirectory.of_this_process() is not None:
            return 0  # the launcher knows; the one underneath would make a failure of it, and end the others
        return stop.exit_code
    return 0


@contextlib.contextmanager
def _resumable(launch: "LaunchEnvironment", run: Path) -> Iterator[None]:
    """Say how to resume a run that is stopped or fails, before the reason; `qa-dist launch` does so by itself."""
    from qa_dist.training.next_steps import after_stop, command_of_this_process

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        may_be_resumed = not isinstance(error, UserError) or error.exit_code == TrainingError.exit_code
        if launch.is_main and may_be_resumed and LaunchDirectory.of_this_process() is None:
            for line in after_stop(run, command_of_this_process()):
                _say(f"qa-dist: {line}")
        raise


def _task_is_the_models(stored: object, config: RunConfig) -> list[Problem]:
    if stored in (None, config.task):
        return []
    was, has_to_be = (str(name).replace("_", " ") for name in (stored, config.task))
    message = f"model.name: {config.model.name} is a model for {was}, and the task is {has_to_be}; set task to {stored}"
    return [Problem(("task", "model.name"), message)]


def _changes_are_settings(names: Sequence[str], config: RunConfig) -> list[Problem]:
    return [
        Problem((name,), f"--allow_changed: there is no setting {name!r}")
        for name in names
        if not any(key == name or key.startswith(f"{name}.") for key, _ in leaves())
    ]


def _resume_is_possible(resume: "Resume", config: RunConfig) -> list[Problem]:
    name = resume.repository[0] if resume.is_from_hub else None
    if name is not None and not checks.REPO_ID.fullmatch(name):
        return [Problem((), f"--resume: {name!r} is not the name of a repository; write hub:user/name")]
    if resume.is_from_hub and name is None and config.hub.repo_id is None:
        message = "--resume hub: hub.repo_id is not set; set it, or name the repository (--resume hub:user/name)"
        return [Problem(("hub.repo_id",), message)]
    return []


def _output_dir_is_free(
    launch: "LaunchEnvironment", resume: "Resume", command: str, config: RunConfig
) -> list[Problem]:
    from qa_dist.reporting.run_directory import require_free

    try:
        # The others may look when the main process has already begun to write. Where a run is to go on, whose the
        # directory is is seen once its checkpoints are known.
        if launch.is_main and not resume.is_in_place:
            of_default_name = command != "train" and config.run.output_dir is None
            what = "the results of this model on these data" if of_default_name else "another run"
            require_free(config.output_dir, may_go_on=command == "train", what=what)
    except UserError as error:
        return [Problem(("run.output_dir",), str(error))]
    return []


def _prepare(config: RunConfig) -> int:
    from rich.console import Console

    from qa_dist.reporting.tracker import summary_table
    from qa_dist.tasks import load_task

    task = load_task(config)
    sets = {split: features for split in ("train", "validation") if (features := task.features(split)) is not None}
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary_table(sets))
    for split, features in sets.items():
        for note in features.notes:
            console.print(f"{split}: note: {note}", markup=False)
    return 0


def _score(config: RunConfig, options: dict[str, str | None]) -> int:
    figures, notes = scoring.score(config, options)
    for note in notes:
        _tell(f"qa-dist: note: {note}")
    print(json.dumps(figures, indent=2))
    return 0


def _report(args: list[str]) -> int:
    from qa_dist.reporting.report import write_report

    @dataclass
    class Options:
        run: tyro.conf.Positional[Path]
        """The run directory."""
        compare: Path | None = None
        """Another run, whose figures and answers are set beside."""
        output: Path | None = None
        """The page; by default report.html in the run directory."""

    options = tyro.cli(Options, args=args, prog="qa-dist report", description=COMMANDS["report"])
    print(write_report(options.run, options.output, options.compare, _say))
    return 0


def _push(args: list[str]) -> int:
    from qa_dist.training import hub_commands

    path = Path(args[0]) if args and not args[0].startswith("-") else None
    flags, _ = from_flags(args[1:] if path else args, "qa-dist hub push RUN", COMMANDS["hub push"], {})
    if path is None:
        raise UserError("hub push: names no run directory; write qa-dist hub push RUN")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: is not a run directory (there is no config.yaml)")
    config = resolve([from_yaml(path / "config.yaml"), flags], [checks.hub_rules])
    return hub_commands.push(path, config, lambda text: print(text, flush=True))


def _model_name(sources: list[Source]) -> str | None:
    """What the sources say of model.name, before they are known to be right."""
    names = [source.values["model"].get("name") for source in sources if isinstance(source.values.get("model"), dict)]
    return next((name for name in reversed(names) if isinstance(name, str)), None)
