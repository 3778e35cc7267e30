"""`lit-palm import` and `lit-palm export`: between other tools' files and checkpoints of ours."""
