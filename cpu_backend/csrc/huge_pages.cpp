// Which pages a mapping stands in, and how it gets others: what moving weights into huge pages
// takes. On other systems than Linux nobody knows, and nothing moves.
#include <cerrno>

#include "bindings.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nb = nanobind;

namespace moeserve {
namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

#if defined(__linux__)

const std::size_t kPage = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

// Of newer systems than those that this may be built on.
constexpr int kPopulateRead = 22;          // MADV_POPULATE_READ, Linux 5.14
constexpr int kDontUnmap = 4;              // MREMAP_DONTUNMAP, Linux 5.7
constexpr std::uint64_t kIsHuge = 1 << 6;  // PAGE_IS_HUGE, Linux 6.7

// struct page_region and struct pm_scan_arg of linux/fs.h.
struct PageRegion {
  std::uint64_t start, end, categories;
};
struct PageScan {
  std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  std::uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
const unsigned long kPagemapScan = _IOWR('f', 16, PageScan);

// The number of bytes, from the start on, that lie in huge pages; -1 with errno.
std::int64_t leading_huge_bytes(int pagemap, const std::uint8_t *start, std::size_t num_bytes) {
  PageRegion region{};
  PageScan scan{};
  scan.size = sizeof scan;
  scan.start = reinterpret_cast<std::uintptr_t>(start);
  scan.end = scan.start + num_bytes;
  scan.vec = reinterpret_cast<std::uintptr_t>(&region);
  scan.vec_len = 1;
  scan.category_mask = scan.return_mask = kIsHuge;
  const int found = ioctl(pagemap, kPagemapScan, &scan);
  if (found < 0) return -1;
  if (found == 0 || region.start != scan.start) return 0;
  return static_cast<std::int64_t>(region.end - region.start);
}

// 1, 0, or -1 where the system does not tell.
int in_huge_pages(const std::uint8_t *start, std::size_t num_bytes) {
  // What is refused here (the file is shorter, the system older) shows when it is read.
  madvise(const_cast<std::uint8_t *>(start), num_bytes, kPopulateRead);
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return -1;
  const std::int64_t huge = leading_huge_bytes(pagemap, start, num_bytes);
  close(pagemap);
  return huge < 0 ? -1 : static_cast<std::size_t>(huge) == num_bytes;
}

// 0, or the error's number.
int move(std::uint8_t *source, std::uint8_t *target, std::size_t num_bytes) {
  const int how = MREMAP_MAYMOVE | MREMAP_FIXED | kDontUnmap;
  return mremap(source, num_bytes, num_bytes, how, target) == MAP_FAILED ? errno : 0;
}

int drop(std::uint8_t *start, std::size_t num_bytes) {
  return madvise(start, num_bytes, MADV_DONTNEED) == 0 ? 0 : errno;
}

#else

constexpr std::size_t kPage = 4096;

int in_huge_pages(const std::uint8_t *, std::size_t) { return -1; }

int move(std::uint8_t *, std::uint8_t *, std::size_t) { return ENOSYS; }

int drop(std::uint8_t *, std::size_t) { return ENOSYS; }

#endif

// The system would round lengths up, over what lies behind the array.
template <class A>
void check_whole_pages(const A &array, const char *name) {
  const auto address = reinterpret_cast<std::uintptr_t>(array.data());
  if ((address | array.shape(0)) % kPage != 0) {
    refuse(name, "is not made of whole pages of " + std::to_string(kPage) + " bytes");
  }
}

void raise_unless_zero(int error) {
  if (error == 0) return;
  errno = error;
  PyErr_SetFromErrno(PyExc_OSError);
  throw nb::python_error();
}

nb::object is_huge(const ConstBytes &pages) {
  check_whole_pages(pages, "pages");
  int huge = -1;
  {
    const nb::gil_scoped_release release;
    huge = in_huge_pages(pages.data(), pages.shape(0));
  }
  return huge < 0 ? nb::none() : nb::object(nb::bool_(huge == 1));
}

void move_pages(const Bytes &source, const Bytes &target) {
  check_whole_pages(source, "source");
  check_whole_pages(target, "target");
  check_size(target, "target", source.shape(0));
  int error = 0;
  {
    const nb::gil_scoped_release release;
    error = move(source.data(), target.data(), source.shape(0));
  }
  raise_unless_zero(error);
}

void drop_pages(const Bytes &pages) {
  check_whole_pages(pages, "pages");
  raise_unless_zero(drop(pages.data(), pages.shape(0)));
}

}  // namespace

void bind_huge_pages(nb::module_ &m) {
  m.def("is_huge", &is_huge, nb::arg("pages").noconvert(),
        "Maps what is not mapped yet and says whether all of it lies in huge pages.");
  m.def("move_pages", &move_pages, nb::arg("source").noconvert(), nb::arg("target").noconvert(),
        "Puts the pages of one mapping in the place of another's.");
  m.def("drop_pages", &drop_pages, nb::arg("pages").noconvert(), "Gives anonymous pages back.");
}

}  // namespace moeserve
