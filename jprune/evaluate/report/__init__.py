"""A comparison as one HTML file that needs nothing else: no network, light and dark, on paper too."""

from jprune.evaluate.report.page import page as page
from jprune.evaluate.report.plot import thinned as thinned
