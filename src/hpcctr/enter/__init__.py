"""The program `enter`: what it is in enter.c, what it defends in README.md; here are how it is built and installed."""
