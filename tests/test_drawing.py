"""What all figures share: places of labels, what is undecided, smoothing, files for papers."""

import numpy as np
import pytest
from test_plot_results import plant_pairs

import drawing
import plot_results
from drawing import includes_one, smoothed, spread


@pytest.mark.parametrize("wanted, gap", [([0.1, 0.5, 0.9], 0.1), ([0.5, 0.5, 0.5], 0.1), ([0.0, 0.0, 0.0, 0.3], 0.1), ([0.95, 0.97, 1.0], 0.05)])
def test_labels_are_spread_without_overlap_and_about_their_lines(wanted, gap):
    places = spread(wanted, gap)
    assert min(np.diff(places)) >= gap - 1e-9 and 0 <= places[0] and places[-1] <= 1 + 1e-9
    if wanted == [0.1, 0.5, 0.9]:
        assert places == pytest.approx(wanted)
    if wanted == [0.5, 0.5, 0.5]:
        assert places == pytest.approx([0.4, 0.5, 0.6])


def test_a_cell_is_undecided_where_the_interval_over_seeds_includes_one():
    logs = np.log([[1.10, 0.90, 1.3], [1.11, 1.12, 1.3], [1.12, 1.0, 1.3]])  # (seeds, cells)
    assert includes_one(logs).tolist() == [False, True, False]
    assert includes_one(logs[:1]).tolist() == [True] * 3  # one seed tells nothing


def test_smoothing_keeps_constants_also_at_the_edges():
    assert smoothed(np.full(7, 3.0), 4) == pytest.approx(3.0)
    assert smoothed(np.arange(7.0), 3)[1:-1] == pytest.approx(np.arange(1.0, 6.0))


def test_a_paper_gets_vector_graphics_without_title_and_caption(tmp_path, monkeypatch):
    plant_pairs(tmp_path, base=(2.0, 4.0), other=(1.0, 1.0), seeds=(0, 1))
    figures, write = [], drawing.write_pdf
    monkeypatch.setattr(drawing, "write_pdf", lambda figure, path: figures.append(figure) or write(figure, path))
    paths = plot_results.main([str(tmp_path), "--figure", "curves", "ratio1_training", "--pdf"])
    assert [path.name for path in paths] == ["curves_2x64.pdf", "ratio1_training.pdf"] and not list(tmp_path.rglob("*.png"))
    first = [path.read_bytes() for path in paths]
    assert all(content.startswith(b"%PDF") and b"/Type3" not in content for content in first)  # fonts of outlines only are refused by some
    assert len(figures) == 2 and not any(figure.texts or figure.get_suptitle() for figure in figures)
    again = plot_results.main([str(tmp_path), "--figure", "curves", "ratio1_training", "--pdf"])
    assert [path.read_bytes() for path in again] == first  # the same tables, the same files
    pictures = plot_results.main([str(tmp_path), "--figure", "curves"])
    assert pictures[0].name == "curves_2x64.png" and pictures[0].stat().st_size > 3000
