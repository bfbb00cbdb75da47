"""The paper from :mod:`rcp`: grids, store, batch, tables, figures and the demo set. No part of the installed package ``rcp``."""
