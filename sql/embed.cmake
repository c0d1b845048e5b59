# embed.cmake - writes OUT, a C file with the text of every queries/*.sql and migrations/*.sql of IN.
# As numbers, not as string literals: no quoting, no length limit.
set(code "/* Made by embed.cmake from sql/queries and sql/migrations. */\n#include \"sql_text.h\"\n\n#include <stddef.h>\n\n")
string(REPEAT "." 98 line) # 14 bytes of seven characters each
foreach(kind queries migrations)
    file(GLOB files ${IN}/${kind}/*.sql)
    list(SORT files)
    set(table "const struct sql_text sql_text_${kind}[] = {\n")
    foreach(file ${files})
        get_filename_component(name ${file} NAME_WE)
        file(READ ${file} hex HEX)
        string(REGEX REPLACE "(..)" "'\\\\x\\1'," bytes "${hex}")
        string(REGEX REPLACE "(${line})" "\\1\n" bytes "${bytes}")
        string(APPEND code "static const char ${kind}_${name}[] = {\n${bytes}0};\n")
        string(APPEND table "    {\"${name}\", ${kind}_${name}},\n")
    endforeach()
    string(APPEND code "\n${table}    {NULL, NULL},\n};\n\n")
endforeach()
file(WRITE ${OUT} "${code}")
