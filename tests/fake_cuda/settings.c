/* Settings and fault injection from the environment, and the names of result codes. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

/* Finds "call=code" in a list separated by commas or blanks. */
static int code_in(const char *list, const char *call)
{
    size_t length = strlen(call);
    while (*list) {
        while (*list == ',' || isspace((unsigned char)*list))
            list++;
        if (!strncmp(list, call, length) && list[length] == '=')
            return atoi(list + length + 1);
        while (*list && *list != ',' && !isspace((unsigned char)*list))
            list++;
    }
    return OK;
}

int injected(const char *call)
{
    const char *list = getenv("FAKE_CUDA_FAIL");
    int code = list ? code_in(list, call) : OK;
    const char *path = getenv("FAKE_CUDA_FAIL_FILE");
    if (code || !path || !*path)
        return code;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return OK;
    char text[4096];
    ssize_t got = read(file, text, sizeof text - 1);
    close(file);
    text[got > 0 ? got : 0] = 0;
    return code_in(text, call);
}

static const struct {
    int code;
    const char *name;
} NAMES[] = {
    {0, "CUDA_SUCCESS"},
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"},
    {4, "CUDA_ERROR_DEINITIALIZED"},
    {34, "CUDA_ERROR_STUB_LIBRARY"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"},
    {205, "CUDA_ERROR_MAP_FAILED"},
    {206, "CUDA_ERROR_UNMAP_FAILED"},
    {208, "CUDA_ERROR_ALREADY_MAPPED"},
    {211, "CUDA_ERROR_NOT_MAPPED"},
    {217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
    {800, "CUDA_ERROR_NOT_PERMITTED"},
    {801, "CUDA_ERROR_NOT_SUPPORTED"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
    {999, "CUDA_ERROR_UNKNOWN"},
};

const char *result_name(int code)
{
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (NAMES[i].code == code)
            return NAMES[i].name;
    return NULL;
}
