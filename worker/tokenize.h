/* tokenize.h - `kiln-worker tokenize`: text to token ids without a database. */
#ifndef KILN_TOKENIZE_H
#define KILN_TOKENIZE_H

/* tokenize_main takes argv from the sub-command's name on and returns the exit code. */
int tokenize_main(int argc, char **argv);

#endif
