"""`python -m pipeline`: the commands of pipeline/commands under their names."""

import typer

from pipeline.commands import artifacts, export, parameters, runs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Commands around the pipeline; `dvc repro` runs it.",
)
for command in (
    *(parameters.recipe, parameters.check, parameters.deps, parameters.tidy),
    *(runs.repro, runs.plan, runs.status, runs.logs, runs.cancel, runs.gc, runs.doctor),
    *(artifacts.compare, artifacts.table, artifacts.verify, artifacts.show, artifacts.import_edm),
    *(export.export, export.export_robustbench),
):
    app.command(command.__name__.replace("_", "-"))(command)
