"""How the toy checkpoint family on board was made: data, training, evaluation. Never imported by the studio."""
