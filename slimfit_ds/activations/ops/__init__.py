"""Operations with the forward values of the original and a backward pass from what a codec kept."""
