"""From a YAML text to the settings of a pipeline."""

import yaml

from granq.messages import compose, not_yaml
from granq.v1 import coordinator_pb2


def read_spec(text: str, origin: str) -> coordinator_pb2.PipelineSpec:
    """Return the settings that ``text`` holds; as :func:`granq.recipes.parse`."""
    spec = coordinator_pb2.PipelineSpec()
    reader, root = compose(text, origin, "recipe")
    try:
        reader.fill(spec, root, "")
    except (yaml.YAMLError, RecursionError) as error:  # of a value: they are read when their field's turn comes
        raise not_yaml(origin, error) from error
    return spec
