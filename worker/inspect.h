/* inspect.h - `kiln-worker inspect`: what a model folder or file is, without rendering. */
#ifndef KILN_INSPECT_H
#define KILN_INSPECT_H

/* inspect_main takes argv from the sub-command's name on and returns the exit code. */
int inspect_main(int argc, char **argv);

#endif
