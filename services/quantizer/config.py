"""What a quantization is configured by: the request messages with their defaults filled in, checked once."""

import enum
import json
from dataclasses import asdict, dataclass, field, replace

from granq.v1 import common_pb2
from services.common import defaults
from services.common.errors import InvalidArgumentError

FEATURE_WEIGHT = 1.0  # of a deployable student, where the request names none
LEARNING_RATE = 4e-3  # of a deployable student: in units of its optimizer (``optimizers.py``)
SIMULATED_LEARNING_RATE = 5e-4  # of SGD

_CO_TRAIN = {common_pb2.TRAINING_MODE_CO_TRAIN: True, common_pb2.TRAINING_MODE_REPLAY: False}


class ActivationGranularity(enum.Enum):
    """Which values of an activation share a range; values are those of the contract."""

    PER_TENSOR = common_pb2.ACTIVATION_GRANULARITY_PER_TENSOR
    PER_CHANNEL = common_pb2.ACTIVATION_GRANULARITY_PER_CHANNEL
    PER_SAMPLE_CHANNEL = common_pb2.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL


class WeightGranularity(enum.Enum):
    """Which values of a weight share a range; values are those of the contract."""

    PER_OUTPUT_CHANNEL = common_pb2.WEIGHT_GRANULARITY_PER_OUTPUT_CHANNEL
    PER_KERNEL = common_pb2.WEIGHT_GRANULARITY_PER_KERNEL


@dataclass(frozen=True)
class LayerBits:
    """Bit widths of one layer's weight and input."""

    weight: int
    activation: int


@dataclass(frozen=True)
class Quantization:
    """Number formats of a model.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        input_bits: Of the image, 2 to 8.
        overrides: Layer names to the (weight, activation) bits that differ; None: as the rest.
        activation_granularity: Which activations share a range.
        weight_granularity: Which weights share a range.
        fold: False leaves PER_CHANNEL ranges outside of the weights: a simulation, for comparisons.
        every_input: Whether a simulation quantizes what every layer reads, as deployable students do, instead of ReLU
            outputs alone, as published. For comparisons.
    """

    weight_bits: int
    activation_bits: int
    input_bits: int = 8
    overrides: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    activation_granularity: ActivationGranularity = ActivationGranularity.PER_CHANNEL
    weight_granularity: WeightGranularity = WeightGranularity.PER_OUTPUT_CHANNEL
    fold: bool = True
    every_input: bool = False

    @property
    def deployable(self) -> bool:
        """Whether an integer engine can run it; otherwise it is a simulation."""
        return self.fold and self.activation_granularity is ActivationGranularity.PER_CHANNEL

    def bits(self, layer: str, reads_input: bool = False) -> LayerBits:
        """Return the bit widths of ``layer``; ``reads_input`` says that its input is the image."""
        weight, activation = self.overrides.get(layer, (None, None))
        default = self.input_bits if reads_input else self.activation_bits
        return LayerBits(weight or self.weight_bits, activation or default)

    def check_layers(self, layers: list[str]) -> None:
        """Refuse overrides of layers that the model does not have.

        Raises:
            InvalidArgumentError: names the first unknown layer and some that exist.
        """
        for index, name in enumerate(self.overrides):
            if name not in layers:
                known = ", ".join(layers[:5]) + (", …" if len(layers) > 5 else "")
                raise InvalidArgumentError(
                    f"the model has no quantizable layer {name!r}; its layers are {known}",
                    reason="LAYER_UNKNOWN",
                    field=f"quantization.overrides[{index}].layer",
                )

    @classmethod
    def from_proto(cls, message: common_pb2.QuantizationConfig) -> "Quantization":
        """Fill in the defaults of the contract."""
        return cls(
            weight_bits=message.weight_bits,
            activation_bits=message.activation_bits,
            input_bits=message.input_bits if message.HasField("input_bits") else 8,
            overrides={
                o.layer: (
                    o.weight_bits if o.HasField("weight_bits") else None,
                    o.activation_bits if o.HasField("activation_bits") else None,
                )
                for o in message.overrides
            },
            activation_granularity=ActivationGranularity(
                message.activation_granularity or ActivationGranularity.PER_CHANNEL.value
            ),
            weight_granularity=WeightGranularity(
                message.weight_granularity or WeightGranularity.PER_OUTPUT_CHANNEL.value
            ),
        )

    def to_json(self) -> str:
        """Return a versioned text form, kept with the quantized model."""
        values = asdict(self) | {
            "version": 1,
            "activation_granularity": self.activation_granularity.name,
            "weight_granularity": self.weight_granularity.name,
        }
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Quantization":
        """Read ``to_json``'s form.

        Raises:
            InvalidArgumentError: the text is not of a version that this code reads.
        """
        values = json.loads(text)
        if values.pop("version", None) != 1:
            raise InvalidArgumentError(
                "the quantized model was written by another version; quantize the model again",
                reason="QUANTIZED_MODEL_VERSION",
                field="quantized_model",
            )
        values["overrides"] = {k: (v[0], v[1]) for k, v in values["overrides"].items()}
        values["activation_granularity"] = ActivationGranularity[values["activation_granularity"]]
        values["weight_granularity"] = WeightGranularity[values["weight_granularity"]]
        return cls(**values)


@dataclass(frozen=True)
class Training:
    """Quantization-aware training, in the units of the contract; ``for_family`` fills in what is None."""

    co_train: bool | None = None
    epochs: int = defaults.EPOCHS
    iterations_per_epoch: int = 200
    warmup_epochs: int = defaults.warmup_epochs(defaults.EPOCHS)
    batch_size: int = 16
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 20.0
    feature_weight: float | None = None
    cosine: bool = True
    milestones: tuple[int, ...] = ()
    seed: int = 0
    checkpoint_interval: int = 100

    @property
    def iterations(self) -> int:
        """Iterations in all, warm-up included."""
        return self.epochs * self.iterations_per_epoch

    @property
    def rate_of_weights(self) -> float:
        """Learning rate, where it was given or ``for_family`` filled it in."""
        if self.learning_rate is None:
            raise ValueError("the learning rate depends on the family of the student: call for_family first")
        return self.learning_rate

    @property
    def warmup_iterations(self) -> int:
        """First iterations, in which only the generator learns."""
        return min(self.warmup_epochs, self.epochs) * self.iterations_per_epoch if self.co_train else 0

    def for_family(self, quantization: Quantization) -> "Training":
        """Fill in what depends on the family of the student.

        A simulated one is trained as published: along with the generator, from the logits alone. A deployable one
        replays the synthetic set, since that lets its images get flat areas, and follows the teacher's features.

        Raises:
            InvalidArgumentError: warm-up leaves no epoch for the student.
        """
        co_train = not quantization.deployable if self.co_train is None else self.co_train
        if co_train and 0 < self.epochs <= self.warmup_epochs:
            raise InvalidArgumentError(
                f"{self.warmup_epochs} warm-up epochs leave none of {self.epochs} for the student; raise epochs",
                reason="NO_EPOCH_LEFT",
                field="training.warmup_epochs",
            )
        weight, rate = (FEATURE_WEIGHT, LEARNING_RATE) if quantization.deployable else (0.0, SIMULATED_LEARNING_RATE)
        return replace(
            self,
            co_train=co_train,
            feature_weight=weight if self.feature_weight is None else self.feature_weight,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.TrainingConfig) -> "Training":
        """Fill in the defaults of the contract.

        Raises:
            InvalidArgumentError: milestones do not ascend.
        """
        given = {
            name: getattr(message, name)
            for name in (
                *("epochs", "iterations_per_epoch", "warmup_epochs", "batch_size", "learning_rate", "momentum"),
                *("weight_decay", "temperature", "feature_weight", "seed", "checkpoint_interval"),
            )
            if message.HasField(name)
        }
        given.setdefault("warmup_epochs", defaults.warmup_epochs(given.get("epochs", defaults.EPOCHS)))
        result = cls(
            co_train=_CO_TRAIN.get(message.mode),
            cosine=message.schedule != common_pb2.LEARNING_RATE_SCHEDULE_STEP,
            milestones=tuple(message.milestones),
            **given,
        )
        if list(result.milestones) != sorted(set(result.milestones)):
            raise InvalidArgumentError("milestones must ascend", reason="NOT_ASCENDING", field="training.milestones")
        return result


@dataclass(frozen=True)
class GeneratorLosses:
    """Weights and margins of the losses that shape the images (AdaDFQ; GranQ section 4)."""

    alpha_disagreement: float = 0.2
    alpha_agreement: float = 0.1
    lambda_lower: float = defaults.LAMBDA_LOWER
    lambda_upper: float = defaults.LAMBDA_UPPER
    beta: float = 1.0

    @classmethod
    def from_proto(cls, message: common_pb2.GeneratorConfig) -> "GeneratorLosses":
        """Fill in the defaults of the contract.

        Raises:
            InvalidArgumentError: the margins are reversed.
        """
        names = ("alpha_disagreement", "alpha_agreement", "lambda_lower", "lambda_upper", "beta")
        result = cls(**{name: getattr(message, name) for name in names if message.HasField(name)})
        if result.lambda_lower > result.lambda_upper:
            raise InvalidArgumentError(
                "lambda_lower must not exceed lambda_upper", reason="NOT_ASCENDING", field="generator.lambda_lower"
            )
        return result
