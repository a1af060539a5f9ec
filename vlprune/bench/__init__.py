"""Speed: ``vlprune bench kernels`` measures operations, ``vlprune bench model`` whole models; CSV, tables, pictures.

``docs/speed.md`` tells how it is measured and what the words mean.
"""

METHODS = "uniform:1.0:0.4:0.2:0.1,mustdrop:1.0:0.4:0.2:0.1,hired,flowcut,fastv,snapkv,random"
"""What is measured by default, ``divprune`` besides where it is registered. What keeps all has to cost nothing: that is
measured of a method with one stage, and of one with stages everywhere."""
