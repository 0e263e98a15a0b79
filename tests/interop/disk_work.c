/* Writes to a block device whose every block can be checked afterwards, for the guests of the interoperability tests.
 *
 * Runs inside the guest, statically linked, beside busybox. Write number N of a seed goes to a block that depends on both, and
 * fills it with words that depend on seed, block and N. So a checker needs no copy: it replays the numbers, and knows for each
 * block which write was the last before a given one.
 *
 *   disk_work write DEVICE FIRST BLOCKS SEED COUNT EVERY REPORT
 *       COUNT writes to BLOCKS blocks from FIRST on, each of 4096 bytes and direct; after every EVERY of them a fdatasync, and
 *       then the line "synced N" into the file REPORT. With EVERY 0, neither.
 *   disk_work verify DEVICE FIRST BLOCKS SEED SYNCED LAST
 *       every block must hold its last write up to number SYNCED, or one of those after it up to LAST; or zeroes, if it has
 *       none up to SYNCED. Prints how many blocks were written.
 *   disk_work is DEVICE FIRST BLOCKS BYTE
 *       every byte of the blocks has this value
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8 };

static uint64_t mix(uint64_t value)
{
    value += 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

static uint64_t place(uint64_t seed, uint64_t number, uint64_t blocks)
{
    return mix(seed << 32 ^ number) % blocks;
}

/* Word 0 says which write it was; all others depend on it. */
static uint64_t word(uint64_t seed, uint64_t block, uint64_t number, unsigned index)
{
    return index == 0 ? number : mix(mix(seed ^ number << 20) + block * WORDS + index);
}

static void fail(const char *what, uint64_t block)
{
    fprintf(stderr, "disk_work: %s, block %llu: %s\n", what, (unsigned long long)block, errno ? strerror(errno) : "wrong");
    exit(1);
}

static void transfer(int device, uint64_t *buffer, uint64_t block, int writing)
{
    off_t offset = (off_t)block * BLOCK;
    errno = 0;
    ssize_t done = writing ? pwrite(device, buffer, BLOCK, offset) : pread(device, buffer, BLOCK, offset);
    if (done != BLOCK)
        fail(writing ? "write" : "read", block);
}

static void write_blocks(int device, uint64_t *buffer, uint64_t first, uint64_t blocks, uint64_t seed, char **rest)
{
    uint64_t count = strtoull(rest[0], NULL, 0), every = strtoull(rest[1], NULL, 0);
    int report = every ? open(rest[2], O_WRONLY) : -1;
    for (uint64_t number = 1; number <= count; number++) {
        uint64_t block = place(seed, number, blocks);
        for (unsigned index = 0; index < WORDS; index++)
            buffer[index] = word(seed, block, number, index);
        transfer(device, buffer, first + block, 1);
        if (every && number % every == 0) {
            if (fdatasync(device))
                fail("fdatasync", block);
            dprintf(report, "synced %llu\n", (unsigned long long)number);
        }
    }
}

static void verify_blocks(int device, uint64_t *buffer, uint64_t first, uint64_t blocks, uint64_t seed, char **rest)
{
    uint64_t synced = strtoull(rest[0], NULL, 0), last = strtoull(rest[1], NULL, 0), written = 0;
    uint64_t *least = calloc(blocks, sizeof *least);
    for (uint64_t number = 1; number <= synced; number++)
        least[place(seed, number, blocks)] = number;
    for (uint64_t block = 0; block < blocks; block++) {
        transfer(device, buffer, first + block, 0);
        uint64_t number = buffer[0];
        errno = 0;
        if (number == 0) {
            for (unsigned index = 0; index < WORDS; index++)
                if (buffer[index])
                    fail("neither written nor zeroes", block);
            if (least[block])
                fail("a write that was made durable is lost", block);
            continue;
        }
        if (number > last || place(seed, number, blocks) != block)
            fail("a write that was never made", block);
        if (number < least[block])
            fail("an older write than the one made durable", block);
        for (unsigned index = 0; index < WORDS; index++)
            if (buffer[index] != word(seed, block, number, index))
                fail("content", block);
        written++;
    }
    printf("verified %llu\n", (unsigned long long)written);
}

int main(int count, char **words)
{
    if (count < 6)
        return 2;
    int writing = !strcmp(words[1], "write");
    int device = open(words[2], O_DIRECT | (writing ? O_RDWR : O_RDONLY));
    uint64_t first = strtoull(words[3], NULL, 0), blocks = strtoull(words[4], NULL, 0), seed = strtoull(words[5], NULL, 0);
    void *buffer;
    if (device < 0 || posix_memalign(&buffer, BLOCK, BLOCK))
        fail("open", 0);
    if (writing && count == 9)
        write_blocks(device, buffer, first, blocks, seed, words + 6);
    else if (!strcmp(words[1], "verify") && count == 8)
        verify_blocks(device, buffer, first, blocks, seed, words + 6);
    else if (!strcmp(words[1], "is") && count == 6) {
        for (uint64_t block = first; block < first + blocks; block++) {
            transfer(device, buffer, block, 0);
            for (unsigned index = 0; index < BLOCK; index++)
                if (((unsigned char *)buffer)[index] != seed) {
                    errno = 0;
                    fail("content", block);
                }
        }
    } else
        return 2;
    return 0;
}
