"""Pipelines of several workers behind one name, as the table of throughput measures them."""

from benchmarks.load import throughput


def test_two_workers_share_the_pipelines_of_both() -> None:
    rows: list[tuple[str, ...]] = []
    throughput.measure([1, 2], 1, 0.5, lambda *cells: rows.append(tuple(map(str, cells))), patience=120)
    assert [row[:2] for row in rows] == [("1", "1"), ("2", "2")]
    for row in rows:
        cells = dict(zip(throughput.COLUMNS, row, strict=True))
        # All five jobs of every pipeline were computed, which is so much of the workers' time.
        wanted = 100 * 0.5 * int(cells["pipelines"]) / (float(cells["seconds"]) * int(cells["workers"]))
        assert abs(float(cells["workers computing"].removesuffix(" %")) - wanted) <= 0.51 + 0.01 * wanted
        assert 0 < float(cells["of which the coordinator"]) < float(cells["CPU s a pipeline"])
