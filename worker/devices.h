/* devices.h - `kiln-worker devices`: which GPUs a worker can use. */
#ifndef KILN_DEVICES_H
#define KILN_DEVICES_H

/* devices_main takes argv from the sub-command's name on and returns the exit code. */
int devices_main(int argc, char **argv);

#endif
