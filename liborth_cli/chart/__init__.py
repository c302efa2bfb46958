"""Charts: curves and marks over a pair of axes, as SVG, for the report, for training curves and for the benchmarks.

Drawn by hand because a plotting library would weigh more than the tool, and its SVG is dead: letters as outlines, colours
fixed, nothing for a screen reader or a keyboard to hold on to. Here every part has a class that the style sheet colours for
light and dark paper, texts are texts, and a script can find the points again.
"""

from liborth_cli.chart.draw import Plot, Series, hidden_points, inline, legend, standalone, style

__all__ = ["Plot", "Series", "hidden_points", "inline", "legend", "standalone", "style"]
