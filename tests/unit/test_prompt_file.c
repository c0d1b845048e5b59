/* test_prompt_file.c - prompt files, good, odd and hostile.
 * If this breaks, campaigns render other words than were written, or a bad line is found after a night of work. */
#include "prompt_file.h"

#include "tally.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

static char why[2048];

/* " image=a.png image=b.png mask=m.png strength=0.5 lora=x", what there is of it. */
static const char *inputs_of(const struct prompt_inputs *in)
{
    static char out[2048];
    size_t used = 0;
    out[0] = 0;
    for (int i = 0; i < in->image_count; i++)
        used += (size_t)snprintf(out + used, sizeof out - used, " image=%s", in->images[i]);
    if (in->mask)
        used += (size_t)snprintf(out + used, sizeof out - used, " mask=%s", in->mask);
    if (in->strength != 0)
        used += (size_t)snprintf(out + used, sizeof out - used, " strength=%g", in->strength);
    for (int i = 0; i < in->lora_count; i++)
        used += (size_t)snprintf(out + used, sizeof out - used, " lora=%s", in->loras[i]);
    return out;
}

/* Reads all rows as "line|prompt|negative|seed|WxH|steps|guidance|model|name|labels inputs;" joined; a bad row ends with "!sentence". */
static const char *rows_of(const char *title, enum prompt_format format, const void *data, size_t bytes)
{
    static char out[8192];
    struct prompt_file *f = NULL;
    struct prompt_row row;
    size_t used = 0;
    enum prompt_next next;
    out[0] = why[0] = 0;
    if (!prompt_file_open_memory(&f, data, bytes, title, format, why, sizeof why)) {
        snprintf(out, sizeof out, "!%s", why);
        return out;
    }
    while ((next = prompt_file_next(f, &row, why, sizeof why)) == PROMPT_ROW) {
        char seed[32] = "", guidance[32] = "";
        if (row.has_seed)
            snprintf(seed, sizeof seed, "%llu", (unsigned long long)row.seed);
        if (!isnan(row.guidance))
            snprintf(guidance, sizeof guidance, "%g", row.guidance);
        used += (size_t)snprintf(out + used, sizeof out - used, "%d|%s|%s|%s|%dx%d|%d|%s|%s|%s|%s%s;", (int)row.line, row.prompt,
                                 row.negative ? row.negative : "", seed, row.width, row.height, row.steps, guidance,
                                 row.model ? row.model : "", row.name ? row.name : "", row.labels_json ? row.labels_json : "", inputs_of(&row.inputs));
    }
    if (next != PROMPT_END)
        snprintf(out + used, sizeof out - used, "!%s", why);
    else
        assert_int_equal(prompt_file_next(f, &row, why, sizeof why), PROMPT_END); /* and stays at the end */
    prompt_file_close(f);
    return out;
}

#define ROWS(title, text) rows_of(title, PROMPT_AUTO, text, sizeof(text) - 1)

static void expect_refusal(const char *title, const void *data, size_t bytes, const char *const *words)
{
    const char *rows = rows_of(title, PROMPT_AUTO, data, bytes);
    const char *sentence = strchr(rows, '!');
    if (!sentence)
        fail_msg("accepted as %s", rows);
    for (; *words; words++)
        if (!strstr(sentence, *words))
            fail_msg("'%s' does not say '%s'", sentence, *words);
}

#define REFUSED(title, text, ...) expect_refusal(title, text, sizeof(text) - 1, (const char *const[]){__VA_ARGS__, NULL})

static void txt_is_a_prompt_a_line(void **state)
{
    (void)state;
    assert_string_equal(ROWS("a.txt", "# head\nfox\n\n  a, \"b\"\t\r\n  # no\nlast"),
                        "2|fox|||0x0|0||||;4|a, \"b\"|||0x0|0||||;6|last|||0x0|0||||;");
    assert_string_equal(ROWS("a.txt", ""), "");
    assert_string_equal(ROWS("a.txt", "\n\n# x\n"), "");
    assert_string_equal(ROWS("a.txt", "\xef\xbb\xbf# x\r\nf\xc3\xbc""chs\r\n"), "2|f\xc3\xbc""chs|||0x0|0||||;");
}

static void csv_reads_every_column_and_keeps_the_rest_as_labels(void **state)
{
    (void)state;
    assert_string_equal(
        ROWS("a.CSV", "\xef\xbb\xbfPrompt,NEGATIVE,Seed,width, Height ,steps,guidance,model,name,Category,lora,image\r\n"
                      "\"a \"\"red\"\" fox, twice\",blur,18446744073709551615,64,1024,4,3.5,klein,fox-1,An\"\"imal,,\r\n"),
        "!a.CSV:2: unbalanced quotes: a quote inside a field that does not begin with one; write \"...\"\"...\"");
    assert_string_equal(
        ROWS("a.CSV", "\xef\xbb\xbfPrompt,NEGATIVE,Seed,width, Height ,steps,guidance,model,name,Category,lora,image\r\n"
                      "\"a \"\"red\"\" fox, twice\",blur,18446744073709551615,64,1024,4,3.5,klein,fox-1,\"An\"\"imal\",,\r\n"
                      "\r\nb,,,,,,,,,,,\r\n"),
        "2|a \"red\" fox, twice|blur|18446744073709551615|64x1024|4|3.5|klein|fox-1|{\"Category\":\"An\\\"imal\"};"
        "4|b|||0x0|0||||;");
}

static void rows_name_the_files_they_are_made_from(void **state)
{
    (void)state;
    assert_string_equal(ROWS("a.csv", "prompt,image,Mask,strength,lora\nfox,a b.png; c;,,,\n"), "!a.csv:2: 'image' names a file without a name; "
                        "accepted is a file, or several with ';' between them");
    assert_string_equal(ROWS("a.csv", "prompt,image,Mask,strength,lora\nfox, a b.png ;c.jpg, m.png , 0.5 ,x.safetensors:-0.5;y:z\nowl,,,,\n"),
                        "2|fox|||0x0|0|||| image=a b.png image=c.jpg mask=m.png strength=0.5 lora=x.safetensors:-0.5 lora=y:z;3|owl|||0x0|0||||;");
    assert_string_equal(ROWS("a.jsonl", "{\"prompt\":\"fox\",\"image\":[\"a;b.png\",\"c\"],\"mask\":\"\",\"lora\":\"x:2\",\"strength\":0.25}"),
                        "1|fox|||0x0|0|||| image=a;b.png image=c strength=0.25 lora=x:2;");
    REFUSED("a.jsonl", "{\"prompt\":\"fox\",\"image\":[1]}", "a.jsonl:1:", "'image'", "strings");
    REFUSED("a.jsonl", "{\"prompt\":\"fox\",\"lora\":{\"file\":\"x\"}}", "a.jsonl:1:", "'lora'", "list of strings");
    REFUSED("a.jsonl", "{\"prompt\":\"fox\",\"mask\":1}", "a.jsonl:1:", "'mask'", "string");
}

static void csv_fields_may_hold_line_ends(void **state)
{
    (void)state;
    assert_string_equal(ROWS("a.csv", "prompt,x\n\"one\ntwo\r\n\"\"three\"\"\",1\nnext,2"),
                        "2|one\ntwo\r\n\"three\"|||0x0|0||||{\"x\":\"1\"};5|next|||0x0|0||||{\"x\":\"2\"};");
    assert_string_equal(ROWS("a.csv", "\"prompt\"\r\n\"x\"\r\n\"y\""), "2|x|||0x0|0||||;3|y|||0x0|0||||;");
}

static void csv_with_bad_quotes_names_the_line_where_they_begin(void **state)
{
    (void)state;
    REFUSED("a.csv", "prompt\nok\n\"never\nclosed\nat all\n", "a.csv:3:", "unbalanced quotes", "never closed");
    REFUSED("a.csv", "prompt,x\nok,1\n\"closed\nhere\" and on,1\n", "a.csv:3:", "unbalanced quotes");
    REFUSED("a.csv", "prompt,x\n\"a\nb\",\"c\n", "a.csv:3:", "never closed");
    REFUSED("a.csv", "prompt\n5\" nail\n", "a.csv:2:", "unbalanced quotes");
    REFUSED("a.csv", "prompt\n\"a\"\rb\n", "a.csv:2:", "unbalanced quotes");
    REFUSED("a.csv", "pro\"mpt\n", "a.csv:1:", "unbalanced quotes");
}

/* PartiPrompts.tsv has prompts that begin with a quoted word; they must be rendered as they are written. */
static void tsv_takes_fields_that_go_on_after_quotes_as_written(void **state)
{
    (void)state;
    assert_string_equal(ROWS("a.tsv", "Prompt\tNote\n\"G I G\" painted\tof \"Dogs\"\n\"quoted\ttab\"\t\"\"\n\"Hi\" said \"Bo\"\tx\n5\" nail\t\n"),
                        "2|\"G I G\" painted|||0x0|0||||{\"Note\":\"of \\\"Dogs\\\"\"};3|quoted\ttab|||0x0|0||||;"
                        "4|\"Hi\" said \"Bo\"|||0x0|0||||{\"Note\":\"x\"};5|5\" nail|||0x0|0||||;");
    REFUSED("a.tsv", "prompt\tx\nok\t1\n\"no\tend\n", "a.tsv:3:", "never closed");
    REFUSED("a.tsv", "prompt\tx\nok\t1\n\"two\nlines\" more\t1\n", "a.tsv:3:", "unbalanced quotes");
}

static void headers_that_do_not_say_what_is_what_are_refused(void **state)
{
    (void)state;
    REFUSED("a.csv", "text,seed\nfox,1\n", "a.csv:1:", "'prompt'", "'text'");
    REFUSED("a.csv", "prompt,Seed,SEED\n", "a.csv:1:", "columns 2 and 3", "'SEED'");
    REFUSED("a.csv", "prompt,tag,Tag\n", "columns 2 and 3");
    REFUSED("a.csv", "prompt,,x\n", "column 2 has no name");
    REFUSED("a.csv", "prompt,x\nfox\n", "a.csv:2:", "1 field, the header has 2; every column needs a field", "comma");
    REFUSED("a.tsv", "prompt\tx\ty\nfox\tred\n", "a.tsv:2:", "2 fields, the header has 3; every column needs a field", "tab");
    REFUSED("a.csv", "prompt,x\nfox, red, fast\n", "a.csv:2:", "3 fields", "comma");
    char wide[600] = "prompt";
    for (int i = 0; i < 280; i++)
        strcat(wide, ",");
    expect_refusal("a.csv", wide, strlen(wide), (const char *const[]){"more than 255 columns", NULL});
    assert_string_equal(ROWS("a.csv", ""), "");
    assert_string_equal(ROWS("a.csv", "prompt,x\n"), "");
}

static void jsonl_is_an_object_a_line(void **state)
{
    (void)state;
    assert_string_equal(
        ROWS("a.jsonl", "{\"prompt\":\"f\\u00fcchs \\ud83e\\udd8a\",\"negative\":\"\",\"seed\":18446744073709551615,\"width\":64,"
                        "\"height\":\"128\",\"steps\":4,\"guidance\":2.5,\"model\":null,\"name\":\"a\",\"lora\":[],\"image\":null,"
                        "\"tags\":[1,{\"x\":null}],\"id\":7}\r\n\n \n{\"Prompt\":\"b\",\"guidance\":1}"),
        "1|f\xc3\xbc""chs \xf0\x9f\xa6\x8a||18446744073709551615|64x128|4|2.5||a|{\"tags\":[1,{\"x\":null}],\"id\":7};"
        "4|b|||0x0|0|1|||;");
    assert_string_equal(ROWS("a.jsonl", "{\"prompt\":\"12345678901234567890 \\\" 12345678901234567890\",\"seed\":12345678901234567890}"),
                        "1|12345678901234567890 \" 12345678901234567890||12345678901234567890|0x0|0||||;");
    REFUSED("a.jsonl", "{\"prompt\":\"a\"}\n{\"prompt\":\n", "a.jsonl:2:", "not valid JSON");
    REFUSED("a.jsonl", "[\"a\"]\n", "a.jsonl:1:", "not a JSON object");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"prompt\":\"b\"}", "a.jsonl:1:", "duplicate");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"Prompt\":\"b\"}", "a.jsonl:1:", "two members", "'prompt'");
    REFUSED("a.jsonl", "{\"prompt\":\"a\\u0000b\"}", "a.jsonl:1:", "not valid JSON");
    REFUSED("a.jsonl", "{\"prompt\":\"\\ud800\"}", "a.jsonl:1:", "not valid JSON");
    REFUSED("a.jsonl", "{\"prompt\":7}", "'prompt' is not a string");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"seed\":true}", "'seed' is not a number");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"seed\":1.5}", "seed '1.5'");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"seed\":18446744073709551616}", "seed '18446744073709551616'");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"seed\":-1}", "seed '-1'");
    REFUSED("a.jsonl", "{\"prompt\":\"a\",\"x\":1e999}", "a.jsonl:1:", "not valid JSON");
}

static void format_is_known_by_ending_else_by_the_first_byte(void **state)
{
    (void)state;
    assert_string_equal(ROWS("stdin", " \n{\"prompt\":\"a\"}"), "2|a|||0x0|0||||;");
    assert_string_equal(ROWS("stdin", "a {x}"), "1|a {x}|||0x0|0||||;");
    assert_string_equal(ROWS("d.csv/prompts", "a,b"), "1|a,b|||0x0|0||||;");
    assert_string_equal(rows_of("stdin", PROMPT_CSV, "prompt\na", 8), "2|a|||0x0|0||||;");
    REFUSED("stdin", "\"Prompt\",seed\r\na,1", "stdin:1:", "--input-format csv", "txt");
    REFUSED("stdin", "\xef\xbb\xbf" "seed\tprompt\n1\ta", "stdin:1:", "--input-format tsv");
    assert_string_equal(ROWS("stdin", "prompt\nmy prompt, seed"), "1|prompt|||0x0|0||||;2|my prompt, seed|||0x0|0||||;");
    assert_string_equal(rows_of("stdin", PROMPT_TXT, "prompt,seed", 11), "1|prompt,seed|||0x0|0||||;");
    assert_string_equal(rows_of("a.csv", PROMPT_TXT, "prompt\na", 8), "1|prompt|||0x0|0||||;2|a|||0x0|0||||;");
}

static void values_out_of_range_are_refused_with_what_is_accepted(void **state)
{
    (void)state;
    static const struct {
        const char *column, *value, *word;
    } cases[] = {
        {"seed", "18446744073709551616", "18446744073709551615"}, {"seed", "-1", "whole number"}, {"seed", "1e3", "whole number"},
        {"seed", "0x10", "whole number"}, {"seed", "1 2", "whole number"}, {"width", "0", "multiples of 16"},
        {"width", "48", "multiples of 16"}, {"height", "100", "multiples of 16"}, {"width", "-64", "multiples of 16"},
        {"width", "99999999999", "multiples of 16"}, {"width", "65552", "multiples of 16"}, {"steps", "0", "1 to 1000"},
        {"steps", "1001", "1 to 1000"}, {"steps", "4.0", "1 to 1000"}, {"guidance", "-0.1", "0 to 100"},
        {"guidance", "100.5", "0 to 100"}, {"guidance", "nan", "0 to 100"}, {"guidance", "inf", "0 to 100"},
        {"guidance", "0x1", "0 to 100"}, {"guidance", "1e400", "0 to 100"}, {"guidance", "3,5", "fields"},
        {"lora", "x:101", "-100 to 100"}, {"lora", ":1", "FILE:SCALE"}, {"image", "a;;b", "without a name"}, {"image", "a;b;", "without a name"},
        {"image", "1;2;3;4;5;6;7;8;9;10;11", "more than 10"}, {"strength", "0", "above 0"}, {"strength", "1.5", "at most 1"},
        {"name", "a/b", "A-Z a-z 0-9"},
        {"name", ".a", "no '.' in front"}, {"name", "a b", "A-Z a-z 0-9"}, {"name", "f\xc3\xbc", "A-Z a-z 0-9"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[200];
        snprintf(text, sizeof text, "prompt,%s\nfox,%s\n", cases[i].column, cases[i].value);
        expect_refusal("a.csv", text, strlen(text), (const char *const[]){"a.csv:2:", cases[i].word, NULL});
    }
    REFUSED("a.csv", "prompt,size\nfox,64\n", "a.csv:2:", "WIDTHxHEIGHT");
    REFUSED("a.csv", "prompt,size,height\nfox,64x64,64\n", "a.csv:2:", "one or the other");
    REFUSED("a.jsonl", "{\"prompt\":\"fox\",\"width\":64,\"size\":\"64x64\"}", "a.jsonl:1:", "one or the other");
    assert_string_equal(ROWS("a.csv", "prompt,Size\nfox, 64x128 \nowl,\n"), "2|fox|||64x128|0||||;3|owl|||0x0|0||||;");
    REFUSED("a.csv", "prompt,width,height\nfox,2048,2064\n", "a.csv:2:", "2048x2064", "4194304");
    assert_string_equal(ROWS("a.csv", "prompt,width,height,seed,guidance\nfox,2048,2048, 7 ,0\n"), "2|fox||7|2048x2048|0|0|||;");
    assert_string_equal(ROWS("a.csv", "prompt,width\nfox,65536\n"), "2|fox|||65536x0|0||||;");
}

static void rows_need_a_prompt_and_names_are_used_once(void **state)
{
    (void)state;
    REFUSED("a.csv", "prompt,x\nfox,1\n,2\n", "a.csv:3:", "prompt is empty");
    REFUSED("a.csv", "prompt\n\"  \"\n", "a.csv:2:", "prompt is empty");
    REFUSED("a.jsonl", "{\"prompt\":\"\"}", "a.jsonl:1:", "prompt is empty");
    REFUSED("a.jsonl", "{\"text\":\"fox\"}", "a.jsonl:1:", "prompt is empty");
    REFUSED("a.csv", "prompt,name\na,x\nb,y\nc,x\n", "a.csv:4:", "'x'", "line 2");
    char longest[300] = "prompt,name\na,";
    for (int i = 0; i < 100; i++)
        strcat(longest, "n");
    assert_null(strchr(rows_of("a.csv", PROMPT_AUTO, longest, strlen(longest)), '!'));
    strcat(longest, "n");
    expect_refusal("a.csv", longest, strlen(longest), (const char *const[]){"a.csv:2:", "1 to 100", NULL});
}

static void text_that_is_not_text_names_line_and_byte(void **state)
{
    (void)state;
    REFUSED("a.txt", "fox\nred \xff fox\n", "a.txt:2:", "byte 5 is 0xff", "UTF-8");
    REFUSED("a.txt", "fox\n\nab\0cd\n", "a.txt:3:", "byte 3 is NUL");
    REFUSED("a.csv", "prompt,x\n\"one\ntw\xc0\xafo\",1\n", "a.csv:3:", "byte 3 is 0xc0");
    REFUSED("a.jsonl", "{\"prompt\":\"\xed\xa0\x80\"}", "a.jsonl:1:", "byte 12 is 0xed"); /* a surrogate */
    REFUSED("a.txt", "\xff\xfe" "f\0o\0x\0", "UTF-16", "UTF-8");
    REFUSED("a.txt", "cut at the end \xf0\x9f\xa6", "a.txt:1:", "byte 16 is 0xf0");
    REFUSED("a.txt", "fox \xef\xbb\xbf\xf5", "byte 8 is 0xf5"); /* the mark inside a line is a character */
}

/* All mistakes of a file are to be told at once. */
static void rows_behind_a_wrong_one_are_read(void **state)
{
    static const struct { const char *title, *text; enum prompt_next seen[7]; } files[] = {
        {"a.txt", "fox\nb\xff" "d\nowl", {PROMPT_ROW, PROMPT_BAD, PROMPT_END}},
        {"a.csv", "prompt,seed\nfox,1\nowl,x\nhen\n,2\ncat,3", {PROMPT_ROW, PROMPT_WRONG, PROMPT_WRONG, PROMPT_WRONG, PROMPT_ROW, PROMPT_END}},
        {"a.csv", "prompt\nfox\n\"owl\nhen", {PROMPT_ROW, PROMPT_BAD, PROMPT_END}},
        {"a.jsonl", "{\n[1]\n{\"seed\":1}\n{\"prompt\":1}\n{\"prompt\":\"a\"}", {PROMPT_WRONG, PROMPT_WRONG, PROMPT_WRONG, PROMPT_WRONG, PROMPT_ROW, PROMPT_END}},
    };
    (void)state;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        struct prompt_file *f;
        struct prompt_row row;
        assert_true(prompt_file_open_memory(&f, files[i].text, strlen(files[i].text), files[i].title, PROMPT_AUTO, why, sizeof why));
        for (const enum prompt_next *seen = files[i].seen;; seen++) {
            assert_int_equal(prompt_file_next(f, &row, why, sizeof why), *seen);
            if (*seen == PROMPT_END)
                break;
        }
        prompt_file_close(f);
    }
}

static void limits_of_lines_and_prompts_are_exact(void **state)
{
    (void)state;
    char *text = malloc(2 * PROMPT_FILE_LINE_MAX);
    memset(text, 'x', 2 * PROMPT_FILE_LINE_MAX);
    static char place[64];
    struct prompt_file *f;
    struct prompt_row row;
    assert_true(prompt_file_open_memory(&f, text, PROMPT_FILE_PROMPT_MAX, "a.txt", PROMPT_AUTO, why, sizeof why));
    assert_int_equal(prompt_file_next(f, &row, why, sizeof why), PROMPT_ROW);
    assert_int_equal(strlen(row.prompt), PROMPT_FILE_PROMPT_MAX);
    prompt_file_close(f);
    expect_refusal("a.txt", text, PROMPT_FILE_PROMPT_MAX + 1, (const char *const[]){"a.txt:1:", "65537 bytes", "65536", NULL});
    text[0] = '#'; /* a comment may be as long as a line */
    assert_string_equal(rows_of("a.txt", PROMPT_AUTO, text, PROMPT_FILE_LINE_MAX), "");
    snprintf(place, sizeof place, "longer than %u bytes", PROMPT_FILE_LINE_MAX);
    expect_refusal("a.txt", text, PROMPT_FILE_LINE_MAX + 1, (const char *const[]){"a.txt:1:", place, NULL});
    memcpy(text, "prompt\n\"", 8);
    expect_refusal("a.csv", text, 2 * PROMPT_FILE_LINE_MAX, (const char *const[]){"a.csv:2:", place, NULL});
    for (size_t i = 8; i < 2 * PROMPT_FILE_LINE_MAX; i++) /* hostile: each line may be the last of the quote */
        text[i] = '\n';
    expect_refusal("a.csv", text, 2 * PROMPT_FILE_LINE_MAX, (const char *const[]){"a.csv:2:", place, NULL});
    free(text);
}

/* A pipe that gives a few bytes at a time, and rows over every border of the buffer. */
static void rows_are_the_same_however_they_arrive(void **state)
{
    (void)state;
    enum { ROW_COUNT = 60000 };
    char path[] = "/tmp/kiln-test-prompts.XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(unlink(path), 0);
    FILE *out = fdopen(dup(fd), "w");
    fputs("prompt,name,note\n", out);
    for (int i = 0; i < ROW_COUNT; i++)
        fprintf(out, "\"prompt %d,\n%.*s\",n%d,\"q\"\"%d\"\n", i, i % 97, "................................................................................................................", i, i);
    assert_int_equal(fclose(out), 0);
    assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
    struct prompt_file *f;
    struct prompt_row row;
    assert_true(prompt_file_open(&f, fd, "x.csv", PROMPT_AUTO, why, sizeof why));
    for (int i = 0; i < ROW_COUNT; i++) {
        char prompt[300], label[64], name[32];
        assert_int_equal(prompt_file_next(f, &row, why, sizeof why), PROMPT_ROW);
        snprintf(prompt, sizeof prompt, "prompt %d,\n%.*s", i, i % 97, "................................................................................................................");
        snprintf(name, sizeof name, "n%d", i);
        snprintf(label, sizeof label, "{\"note\":\"q\\\"%d\"}", i);
        if (row.line != 2 + 2 * i)
            fail_msg("row %d is said to begin in line %lld", i, (long long)row.line);
        assert_string_equal(row.prompt, prompt);
        assert_string_equal(row.name, name);
        assert_string_equal(row.labels_json, label);
    }
    assert_int_equal(prompt_file_next(f, &row, why, sizeof why), PROMPT_END);
    prompt_file_close(f);
    close(fd);
}

static void million_lines_need_the_memory_of_one(void **state)
{
    (void)state;
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    pid_t child = fork();
    if (child == 0) {
        FILE *out = fdopen(fds[1], "w");
        for (int i = 0; i < 1000000; i++)
            fprintf(out, "a prompt of some thirty bytes %d\n", i);
        _exit(fclose(out));
    }
    close(fds[1]);
    struct prompt_file *f;
    struct prompt_row row;
    struct rusage before, after;
    int64_t count = 0;
    getrusage(RUSAGE_SELF, &before);
    assert_true(prompt_file_open(&f, fds[0], "stdin", PROMPT_AUTO, why, sizeof why));
    while (prompt_file_next(f, &row, why, sizeof why) == PROMPT_ROW)
        count++;
    prompt_file_close(f);
    getrusage(RUSAGE_SELF, &after);
    close(fds[0]);
    assert_int_equal(count, 1000000);
    assert_true(after.ru_maxrss - before.ru_maxrss < 8 << 10); /* KiB: the buffer, not the 37 MB of the file */
}

static void tally_counts_a_hundred_thousand_keys(void **state)
{
    (void)state;
    struct tally t = {0};
    for (int pass = 1; pass <= 3; pass++)
        for (uint64_t i = 0; i < 100000; i++) {
            uint8_t key[16] = {0};
            uint64_t word = i * UINT64_C(0x9e3779b97f4a7c15);
            memcpy(key, &word, 8);
            memcpy(key + 8, &i, 8);
            struct tally_slot *slot = tally_add(&t, key);
            assert_non_null(slot);
            assert_int_equal(slot->count, pass);
            assert_true(pass == 1 ? slot->mark == 0 : slot->mark == i + 1);
            slot->mark = (uint32_t)i + 1;
        }
    assert_int_equal(t.count, 100000);
    tally_done(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(txt_is_a_prompt_a_line),
        cmocka_unit_test(csv_reads_every_column_and_keeps_the_rest_as_labels),
        cmocka_unit_test(rows_name_the_files_they_are_made_from),
        cmocka_unit_test(csv_fields_may_hold_line_ends),
        cmocka_unit_test(csv_with_bad_quotes_names_the_line_where_they_begin),
        cmocka_unit_test(tsv_takes_fields_that_go_on_after_quotes_as_written),
        cmocka_unit_test(headers_that_do_not_say_what_is_what_are_refused),
        cmocka_unit_test(jsonl_is_an_object_a_line),
        cmocka_unit_test(format_is_known_by_ending_else_by_the_first_byte),
        cmocka_unit_test(values_out_of_range_are_refused_with_what_is_accepted),
        cmocka_unit_test(rows_need_a_prompt_and_names_are_used_once),
        cmocka_unit_test(text_that_is_not_text_names_line_and_byte),
        cmocka_unit_test(rows_behind_a_wrong_one_are_read),
        cmocka_unit_test(limits_of_lines_and_prompts_are_exact),
        cmocka_unit_test(rows_are_the_same_however_they_arrive),
        cmocka_unit_test(million_lines_need_the_memory_of_one),
        cmocka_unit_test(tally_counts_a_hundred_thousand_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
