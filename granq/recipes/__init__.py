"""Recipes: settings of a pipeline in a YAML file, without the model.

A recipe has the fields of granq.v1.PipelineSpec in protobuf's JSON form, with the names of the protos; ``model`` is
left to whoever uses it. Ranges are the server's to check. Two families are shipped and never mixed: "deployable" runs
on integer engines; "simulated" repeats published figures, which no engine does. Reading needs PyYAML (extra "cli").
"""

from typing import TYPE_CHECKING

from granq import documents
from granq.v1 import coordinator_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message


def names() -> list[str]:
    """Return the shipped recipes, such as "deployable/default"."""
    return documents.names(__name__)


def read(name: str) -> str:
    """Return the text of a recipe: a file if the name ends with .yaml or .yml, else one of :func:`names`.

    Raises:
        ValueError: No recipe of that name is shipped, or the file is not UTF-8.
        OSError: The file cannot be read.
    """
    return documents.read(__name__, "recipe", name, names())


def summary(text: str) -> str:
    """Return the first line of a recipe without its comment sign; "" if it is no comment."""
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def load(name: str) -> coordinator_pb2.PipelineSpec:
    """Return the settings of a shipped recipe or a file, as :func:`read` finds it.

    Raises:
        ValueError: There is no such recipe, or it is not valid; the message names file, line and field.
        OSError: The file cannot be read.
    """
    return parse(read(name), name)


def parse(text: str, origin: str) -> coordinator_pb2.PipelineSpec:
    """Return the settings that a YAML text holds; ``origin`` names it in errors.

    Raises:
        ValueError: Not YAML, an unknown or repeated field, a value of a wrong kind, or a model.
    """
    try:
        from granq.recipes.reading import read_spec
    except ModuleNotFoundError as error:
        raise ValueError(f"recipes need {error.name}: pip install 'granq-pipeline[cli]'") from error
    return read_spec(text, origin)


def combine(recipe: coordinator_pb2.PipelineSpec, given: coordinator_pb2.PipelineSpec) -> coordinator_pb2.PipelineSpec:
    """Return ``given`` with the recipe's values in the fields that it leaves unset; a list is taken as a whole."""
    result = coordinator_pb2.PipelineSpec()
    result.CopyFrom(recipe)
    _overlay(result, given)
    return result


def _overlay(below: "Message", above: "Message") -> None:
    for field, value in above.ListFields():
        if field.is_repeated:
            below.ClearField(field.name)
            getattr(below, field.name).MergeFrom(value)
        elif field.message_type is not None:
            part: Message = getattr(below, field.name)
            part.SetInParent()
            _overlay(part, value)
        else:
            setattr(below, field.name, value)
