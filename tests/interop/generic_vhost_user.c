/* A plugin for QEMU 10 that makes vhost-user-device-pci available to -device.
 *
 * QEMU has had this front-end for any vhost-user device since 8.2, but until 10.2 keeps it from the command line "to stop
 * inexperienced users confusing themselves": a flag of the class, DeviceClass.user_creatable, is off. Plugins are loaded
 * before devices are made and may call what QEMU exports, so this one switches the flag on. Where it lies depends on
 * QEMU's version, so it is looked for: it is the only byte behind the classes' common part that is 1 in devices that a
 * user may make and 0 in those that he may not. */
#include <stdint.h>
#include <stdio.h>

#define COMMON_PART 96 /* ObjectClass: a type, a list, two caches of four pointers, a function, a table */
#define BEHIND (COMMON_PART + 96)

int qemu_plugin_version = 4;

extern void *object_class_by_name(const char *name);

static const char *const allowed[] = { "vhost-user-rng-pci", "vhost-user-vsock-pci", "virtio-net-pci", "e1000" };
static const char *const kept[] = { "vhost-user-device-pci", "vhost-user-device", "i440FX", "mch" };

static int has(const char *name, int at, unsigned char value)
{
    const unsigned char *class = object_class_by_name(name);
    return class && class[at] == value;
}

static int is_flag(int at)
{
    for (unsigned i = 0; i < sizeof allowed / sizeof *allowed; i++)
        if (!has(allowed[i], at, 1))
            return 0;
    for (unsigned i = 0; i < sizeof kept / sizeof *kept; i++)
        if (!has(kept[i], at, 0))
            return 0;
    return 1;
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
    int found = 0;
    for (int at = COMMON_PART; at < BEHIND; at++)
        if (is_flag(at))
            found = found ? -1 : at;
    if (found <= 0) {
        fprintf(stderr, "this QEMU has no vhost-user-device-pci, or keeps its classes in another form\n");
        return 1;
    }
    ((unsigned char *)object_class_by_name(kept[0]))[found] = 1;
    return 0;
}
