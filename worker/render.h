/* render.h - `kiln-worker render`: prompts to image files, without database or coordinator. */
#ifndef KILN_RENDER_H
#define KILN_RENDER_H

/* render_main is the sub-command's main; argv[0] is its name. Returns the exit code: 0 done, 1 a picture failed, 2 usage or
 * refused input, 128 + n when stopped by signal n. */
int render_main(int argc, char **argv);

#endif
