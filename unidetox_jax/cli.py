"""`unidetox COMMAND`: parses the command line, runs the command, reports errors in one line with an exit code.

ml_collections parses the configuration (`--config=FILE[:name=value,…] --config.a.b=value`), argparse all other
arguments. Only the called command's module is imported, so that `--help` is immediate.
"""

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from unidetox_jax.errors import Preempted, UserError, suggest
from unidetox_jax.stages import STAGES

# command → (module with `add_arguments(parser)` and `run_command(options, run)`, one line of help)
CONFIGURED = {
    "run": ("unidetox_jax.stages.run", "every stage in order; complete ones are skipped"),
    "sweep": ("unidetox_jax.stages.sweep", "a grid of settings: runs every cell, chooses one, tests it"),
    "plan": ("unidetox_jax.plan.command", "memory and time of every stage on a topology, by compiling for it"),
    "bench": ("unidetox_jax.benchmarks.bench", "tokens per second, and shares of the hardware's limits"),
}
# command → (module with `add_arguments(parser)` and `run_command(options)`, one line of help)
PLAIN = {
    "generate": ("unidetox_jax.generate_command", "text from any models under any objective, streamed"),
    "convert": ("unidetox_jax.checkpoint.convert", "Hugging Face to Orbax and back, streamed"),
    "verify": ("unidetox_jax.checkpoint.verify", "compare the logits of two checkpoints"),
}
IN_WORKDIR = ("run", "sweep", *STAGES)  # commands with --workdir, on one or several processes

# Environment variables that set these otherwise for other programs would change results, or stop or slow commands.
JAX_DEFAULTS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 user's mistake, 75 preempted, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals whose encoding lacks a character
    try:
        return _dispatch(argv) or 0
    except (UserError, Preempted) as error:
        line, code = " ".join(str(error).split()), error.exit_code
        cause: BaseException = error
    except KeyboardInterrupt as error:
        line, code, cause = "interrupted; the same command continues", 130, error
    except Exception as error:  # a bug: one line, and how to get the traceback
        text = " ".join(f"{type(error).__name__}: {error}".split())
        line, code, cause = f"{text[:500]} (a traceback: --debug)", 1, error
    if debug:
        traceback.print_exception(cause)
    from unidetox_jax import distributed

    distributed.fail(f"unidetox: {line}", code)  # ends all processes
    return code


def _dispatch(argv: list[str]) -> int | None:
    commands = {**STAGES, **CONFIGURED, **PLAIN}
    if not argv or argv[0] in ("-h", "--help"):
        _print_help(commands)
        return 0 if argv else 2
    command, arguments = argv[0], argv[1:]
    if command not in commands:
        raise UserError(f"no command {command!r}{suggest(command, commands)}")
    _set_up_logging()
    _prepare_jax()
    module_name, help_text = commands[command]
    module = importlib.import_module(module_name)
    parser = _Parser(prog=f"unidetox {command}", description=help_text, allow_abbrev=False)
    if command in PLAIN:
        module.add_arguments(parser)
        return module.run_command(parser.parse_args(arguments))
    return _run_configured(command, module, parser, arguments)


def _run_configured(command: str, module, parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Runs a command with a configuration, in a working directory or without one."""
    from unidetox_jax import devices, distributed, storage
    from unidetox_jax.stages import settings

    devices.keep_freed_memory()
    # expanduser: a shell expands ~ only at the beginning of a word
    parser.add_argument(
        "--config", required=True, type=os.path.expanduser, metavar="FILE[:name=value,…]", help="a file of configs/"
    )
    parser.epilog = "--config.FIELD=VALUE overrides a field of the configuration; --debug shows tracebacks."
    in_workdir = command in IN_WORKDIR
    if in_workdir:
        _add_workdir_arguments(parser)
    if command in CONFIGURED:
        module.add_arguments(parser)
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    options = parser.parse_args([argument for argument in arguments if argument not in overrides])
    if in_workdir:  # before anything initialises a device
        distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            options.coordinator_port,
            options.start_timeout,
        )
    run = settings.parse_run(load_config(options.config, overrides), getattr(options, "workdir", ""))
    if in_workdir and not options.dry_run:
        storage.check_workdir(run.workdir)
    code = (
        (module.run_command(options, run) or 0) if command in CONFIGURED else _run_stage(command, module, options, run)
    )
    distributed.finish()
    return code


def _run_stage(command: str, module, options: argparse.Namespace, run) -> int:
    from unidetox_jax.stages.task import run_tasks

    tasks = module.tasks(run)
    if not tasks:
        section = command.replace("-", "_")
        raise UserError(f"{options.config}: nothing to do for {command}; config.{section} names nothing")
    run_tasks(tasks, options.force, options.dry_run)
    return 0


def _add_workdir_arguments(parser: argparse.ArgumentParser) -> None:
    from unidetox_jax import distributed

    parser.add_argument(
        "--workdir", required=True, type=os.path.expanduser, metavar="DIR", help="of the run; local or gs://"
    )
    parser.add_argument("--force", action="store_true", help="redo what was made with other settings")
    parser.add_argument("--dry_run", action="store_true", help="only print what would be done")
    distributed.add_arguments(parser)


def load_config(path: str, overrides: Sequence[str] = ()):
    """The ConfigDict of `FILE[:argument]` with `--config.a.b=value` overrides.

    Raises:
      UserError: no such file, an error in it, or an unknown field (with the nearest known one).
    """
    file = path.split(":", 1)[0]
    if not os.path.exists(file):
        raise UserError(f"--config: no file {file!r}")
    _check_fields(_parse_config(file, path, ()), overrides)
    return _parse_config(file, path, overrides)


def _parse_config(file: str, path: str, overrides: Sequence[str]):
    from absl import flags
    from ml_collections import config_flags

    arguments = ["unidetox", f"--config={path}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    writes_bytecode, sys.dont_write_bytecode = (
        sys.dont_write_bytecode,
        True,
    )  # its cache compares times in whole seconds
    try:
        values(arguments)
        return values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes_bytecode


def _check_fields(config, overrides: Sequence[str]) -> None:
    """Raises UserError for an override of an unknown field, or without a value."""
    for override in overrides:
        path, equals, _ = override.removeprefix("--config.").partition("=")
        node, seen = config, "config"
        for name in path.split("."):
            if not hasattr(node, "keys") or name not in node:
                raise UserError(f"{seen}.{name}: no such field{suggest(name, node) if hasattr(node, 'keys') else ''}")
            node, seen = node[name], f"{seen}.{name}"
        if not equals:
            raise UserError(f"--{seen}: no value; write --{seen}=VALUE")


class _Parser(argparse.ArgumentParser):
    """argparse with errors as UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _set_up_logging() -> None:
    import logging as standard_logging

    from absl import flags, logging

    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    flags.FLAGS["logtostderr"].value = True
    flags.FLAGS.mark_as_parsed()  # absl does not parse this program's arguments, and would warn
    standard_logging.getLogger("jax").setLevel(standard_logging.WARNING)  # hides messages such as missing backends


def _prepare_jax() -> None:
    import jax
    from absl import logging

    from unidetox_jax import devices

    devices.quiet_libtpu()
    for name, value in JAX_DEFAULTS.items():
        if getattr(jax.config, name) != value:
            logging.info("%s: ignored; commands run with %s", name.upper(), value)
            jax.config.update(name, value)


def _print_help(commands: dict[str, tuple[str, str]]) -> None:
    print("usage: unidetox COMMAND [arguments]     (unidetox COMMAND --help)\n")
    for name, (_, text) in commands.items():
        print(f"  {name:<11} {text}")


if __name__ == "__main__":
    sys.exit(main())
