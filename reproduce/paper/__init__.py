"""The published numbers, as data: Tables 1 to 7 and S1 to S8, Figure 4's d′, and the figures that the prose repeats.

``facts`` reads them; ``checks`` derives every printed mean and difference again and lists the paper's contradictions.
"""

from reproduce.paper.checks import averages, inconsistencies, pixel_column_evidence  # noqa: F401
from reproduce.paper.facts import CATEGORIES, NOT_AVAILABLE, OBJECTS, TEXTURES, abbreviated, published, table, tables  # noqa: F401
