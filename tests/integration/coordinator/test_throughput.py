"""Pipelines of several workers behind one name, as the table of throughput measures them."""

from benchmarks.load import throughput


def test_two_workers_share_the_pipelines_of_both() -> None:
    rows: list[tuple[str, ...]] = []
    throughput.measure([1, 2], 1, 0.5, lambda *cells: rows.append(tuple(map(str, cells))), patience=120)
    assert [row[:2] for row in rows] == [("1", "1"), ("2", "2")]
    for row in rows:
        cells = dict(zip(throughput.COLUMNS, row, strict=True))
        # All five jobs of every pipeline were computed, which is so much of the workers' time. Seconds are shown to a
        # tenth and shares to a percent, so the share lies between what the ends of that tenth give.
        work, workers = 100 * 0.5 * int(cells["pipelines"]), int(cells["workers"])
        seconds, shown = float(cells["seconds"]), float(cells["workers computing"].removesuffix(" %"))
        least, most = work / ((seconds + 0.05) * workers), work / ((seconds - 0.05) * workers)
        assert least - 0.51 <= shown <= most + 0.51
        assert 0 < float(cells["of which the coordinator"]) < float(cells["CPU s a pipeline"])
