"""Colors of figures and of terminals."""

# Distinct for the color-blind, too. What is neither sparse nor dense takes the
# others in turn, and what is not ours is pale or gray.
SPARSE, DENSE = "#0072b2", "#d55e00"
OTHERS = ("#009e73", "#cc79a7", "#b8860b", "#56a4d8", "#5b4a9c")
PALE_SPARSE, PALE_DENSE = "#a3cde6", "#f2bf9d"
GRAY, LIGHT = "#707070", "#b5b5b5"
