"""Joins what evaluator and quantizer measured into one result, each row labelled by what really ran."""

from collections.abc import Iterable

from granq.v1 import coordinator_pb2, jobs_pb2, reports_pb2

Form = reports_pb2.MeasuredForm
SYNTHETIC = "synthetic"


def part_of(result: jobs_pb2.JobResult) -> coordinator_pb2.PipelineResults:
    """Return a single job's result as the part of the pipeline's results that it is."""
    part = coordinator_pb2.PipelineResults()
    match result.WhichOneof("result"):
        case "inspection":
            part.model.CopyFrom(result.inspection)
        case "synthesis":
            part.synthesis.CopyFrom(result.synthesis)
        case "quantization":
            part.quantization.CopyFrom(result.quantization)
        case "export":
            part.export.CopyFrom(result.export)
        case other:
            raise ValueError(f"a job that belongs to one stage alone returned {other}")
    return part


def engine_rows(evaluation: reports_pb2.EvaluationResult, target: str) -> Iterable[reports_pb2.Measurement]:
    """Return the rows that tell of an engine, named after its target; the graphs' own rows come from another job."""
    for row in evaluation.measurements:
        if row.form == Form.MEASURED_FORM_ENGINE:
            named = reports_pb2.Measurement(target=target)
            named.MergeFrom(row)
            yield named


def merge_evaluations(
    graphs: reports_pb2.EvaluationResult | None,
    simulation: reports_pb2.EvaluationResult | None,
    quantization: reports_pb2.QuantizationResult,
) -> reports_pb2.EvaluationResult:
    """Return one result whose rows are ordered float, simulated, exported graphs.

    Args:
        graphs: What the evaluator measured; None when there are no graphs.
        simulation: What the quantizer measured on the labelled set; None without one.
        quantization: Gives the simulated row without a labelled set: the agreement on held-out synthetic images.
    """
    merged = reports_pb2.EvaluationResult()
    rows: list[reports_pb2.Measurement] = []
    if graphs is not None:
        merged.dataset = graphs.dataset
        rows.extend(graphs.measurements)
    if simulation is not None:
        merged.dataset = merged.dataset or simulation.dataset
        rows.extend(
            _simulated(simulation.measurements, have_float=any(r.form == Form.MEASURED_FORM_FLOAT for r in rows))
        )
    else:
        merged.dataset = merged.dataset or SYNTHETIC
        row = reports_pb2.Measurement(form=Form.MEASURED_FORM_SIMULATED, device=quantization.device)
        row.accuracy.agreement = 100.0 * quantization.teacher_agreement
        rows.append(row)
    merged.measurements.extend(sorted(rows, key=lambda row: row.form))
    return merged


def _simulated(rows: Iterable[reports_pb2.Measurement], *, have_float: bool) -> Iterable[reports_pb2.Measurement]:
    # Whatever the quantizer measured ran in PyTorch; only its float row may stand beside the simulation, and only where
    # the evaluator's own, which ran the exported file, is missing.
    for row in rows:
        if row.form == Form.MEASURED_FORM_FLOAT:
            if not have_float:
                yield row
            continue
        simulated = reports_pb2.Measurement()
        simulated.CopyFrom(row)
        simulated.form = Form.MEASURED_FORM_SIMULATED
        yield simulated
