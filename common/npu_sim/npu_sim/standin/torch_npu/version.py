"""Version of the stand-in; the suffix keeps records of simulated runs apart."""

__version__ = "2.14.0+simulated"
