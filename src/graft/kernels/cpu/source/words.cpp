// Byte-pair encoding: texts are cut into the words that a tokenizer's pre-tokenizer makes of them, and each word
// becomes tokens by the merges, once; then it is remembered.
//
// Which characters are letters, numbers or white space, the caller tells, from the tokenizer's own patterns.

#include <stdint.h>
#include <string.h>

#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "graft.h"

namespace graft {
namespace {

// Alone: a character that no merge touches, without a pre-tokenizer. Unknown: texts with it are left.
enum Kind : uint8_t { kOther, kLetter, kNumber, kSpace, kControl, kUnknown, kAlone };
enum Pattern : int32_t { kGpt2, kLlama3, kQwen2, kSpaces };
// Before which sections a mark is put: all; all that do not begin with a space; such a one that begins the text.
enum Marks : int32_t { kNone, kAll, kNotSpaces, kBegin };

constexpr size_t kRemembered = 64;       // bytes of a word that is worth remembering
constexpr size_t kLongest = 512;         // bytes of a word; texts with longer ones are left: merging is quadratic
constexpr size_t kGeneration = 1 << 16;  // words that are remembered before the older half is forgotten
constexpr size_t kSlots = kGeneration * 2;
constexpr uint32_t kNoRank = ~0u;
constexpr uint32_t kNumCharacters = 0x110000;

struct Word {
  uint64_t hash;
  uint32_t key, size;       // in `keys`
  uint32_t numbers, count;  // in `numbers`: ids, then where in the word each begins
  bool marked;              // has a mark put in front; without it the word is another one
};

uint64_t hash_of(const uint8_t* key, size_t size, bool marked) {
  uint64_t hash = 0xcbf29ce484222325ull + marked;
  for (size_t i = 0; i < size; i++) hash = (hash ^ key[i]) * 0x100000001b3ull;
  return hash ^ hash >> 29;
}

class Generation {
 public:
  Generation() : slots_(kSlots) {}

  size_t size() const { return words_.size(); }
  const uint8_t* key(const Word& word) const { return reinterpret_cast<const uint8_t*>(keys_.data()) + word.key; }
  const int32_t* numbers(const Word& word) const { return numbers_.data() + word.numbers; }

  const Word* find(const uint8_t* key, size_t size, bool marked, uint64_t hash) const {
    for (size_t slot = hash % kSlots; slots_[slot]; slot = (slot + 1) % kSlots) {
      const Word& word = words_[slots_[slot] - 1];
      if (word.hash == hash && word.size == size && word.marked == marked && !memcmp(this->key(word), key, size))
        return &word;
    }
    return nullptr;
  }

  const Word* add(const uint8_t* key, size_t size, bool marked, uint64_t hash, const int32_t* numbers,
                  uint32_t count) {
    size_t slot = hash % kSlots;
    while (slots_[slot]) slot = (slot + 1) % kSlots;
    words_.push_back({hash, uint32_t(keys_.size()), uint32_t(size), uint32_t(numbers_.size()), count, marked});
    keys_.append(reinterpret_cast<const char*>(key), size);
    numbers_.insert(numbers_.end(), numbers, numbers + 2 * count);
    slots_[slot] = uint32_t(words_.size());
    return &words_.back();
  }

 private:
  std::vector<uint32_t> slots_;  // places in `words_` plus one
  std::vector<Word> words_;
  std::string keys_;
  std::vector<int32_t> numbers_;
};

// A text decoded: of each character its code, its class, and the byte where it begins.
struct Characters {
  std::vector<uint32_t> codes, bytes;
  std::vector<uint8_t> kinds;

  // UTF-8, as Python makes it. False where a character is unknown.
  bool decode(const uint8_t* text, size_t size, const uint8_t* kind_of) {
    codes.resize(size), bytes.resize(size + 1), kinds.resize(size);
    size_t count = 0;
    for (size_t i = 0; i < size; count++) {
      const uint32_t first = text[i];
      const size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
      if (i + length > size) return false;
      uint32_t code = length == 1 ? first : first & (0xffu >> (length + 1));
      for (size_t k = 1; k < length; k++) code = code << 6 | (text[i + k] & 0x3f);
      if (code >= kNumCharacters) return false;
      codes[count] = code, bytes[count] = uint32_t(i), kinds[count] = kind_of[code];
      if (kinds[count] == kUnknown) return false;
      i += length;
    }
    codes.resize(count), bytes.resize(count + 1), kinds.resize(count);
    bytes[count] = uint32_t(size);
    return true;
  }
};

// Where the word ends that begins at `i`, in the characters before `end`; each as the alternatives of the
// pattern stand in it, the first that matches.
struct Splitter {
  const uint32_t* codes;
  const uint8_t* kinds;

  size_t run(size_t i, size_t end, uint8_t kind) const {
    while (i < end && kinds[i] == kind) i++;
    return i;
  }

  bool is_break(size_t i) const { return codes[i] == '\r' || codes[i] == '\n'; }

  // 's 't 're 've 'm 'll 'd
  size_t contraction(size_t i, size_t end, bool any_case) const {
    if (codes[i] != '\'' || i + 1 >= end) return i;
    const uint32_t bit = any_case ? 0x20 : 0;
    const uint32_t a = codes[i + 1] < 0x80 ? codes[i + 1] | bit : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    const uint32_t b = i + 2 < end && codes[i + 2] < 0x80 ? codes[i + 2] | bit : 0;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? i + 3 : i;
  }

  // \s+(?!\S)|\s+
  size_t space(size_t i, size_t end) const {
    const size_t after = run(i, end, kSpace);
    return after == end || after - i == 1 ? after : after - 1;
  }

  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  size_t gpt2(size_t i, size_t end) const {
    const size_t contracted = contraction(i, end, false);
    if (contracted > i) return contracted;
    const size_t first = i + (codes[i] == ' ');
    if (first < end && kinds[first] != kSpace) return run(first, end, kinds[first]);
    return space(i, end);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
  // |\s+(?!\S)|\s+
  size_t llama3(size_t i, size_t end, size_t most_digits) const {
    const size_t contracted = contraction(i, end, true);
    if (contracted > i) return contracted;
    if (kinds[i] == kLetter) return run(i, end, kLetter);
    if (kinds[i] == kNumber) return run(i, end < i + most_digits ? end : i + most_digits, kNumber);
    if (!is_break(i) && i + 1 < end && kinds[i + 1] == kLetter) return run(i + 1, end, kLetter);
    size_t after = i + (codes[i] == ' ');
    if (after < end && kinds[after] == kOther) {
      after = run(after, end, kOther);
      while (after < end && is_break(after)) after++;
      return after;
    }
    after = run(i, end, kSpace);
    while (after > i && !is_break(after - 1)) after--;
    return after > i ? after : space(i, end);
  }

  // No pre-tokenizer: up to a space that follows something else, or a character that no merge touches.
  size_t spaces(size_t i, size_t end) const {
    if (kinds[i] == kAlone) return i + 1;
    size_t after = i + 1;
    while (after < end && kinds[after] != kAlone && (codes[after] != ' ' || codes[after - 1] == ' ')) after++;
    return after;
  }

  size_t next(size_t i, size_t end, int32_t pattern) const {
    const size_t after = pattern == kGpt2     ? gpt2(i, end)
                         : pattern == kLlama3 ? llama3(i, end, 3)
                         : pattern == kQwen2  ? llama3(i, end, 1)
                                              : spaces(i, end);
    return after > i ? after : i + 1;  // whatever kinds the caller tells
  }
};

struct Symbol {
  int32_t id, start;
  uint32_t rank;  // of its merge with the next one
};

struct Merge {
  uint32_t rank;
  int32_t result;
};

// What words are made of.
class Vocabulary {
 public:
  explicit Vocabulary(const GraftVocabulary& of) : bytes_(of.bytes, of.bytes + 256), mark_(of.mark) {
    for (int64_t i = 0; i < of.num_characters; i++) characters_[uint32_t(of.characters[2 * i])] = of.characters[2 * i + 1];
    merges_.reserve(size_t(of.num_merges));
    for (int64_t i = 0; i < of.num_merges; i++)
      merges_[pair(of.merges[3 * i], of.merges[3 * i + 1])] = {uint32_t(i), of.merges[3 * i + 2]};
    int64_t begin = 0;
    for (int64_t i = 0; i < of.num_wholes; begin = of.whole_ends[i++])
      wholes_[std::string(reinterpret_cast<const char*>(of.wholes) + begin, size_t(of.whole_ends[i] - begin))] = of.whole_ids[i];
  }

  // The tokens of a word; `bytes` of `text` is where each of its characters begins.
  void encode(const uint8_t* text, const uint32_t* codes, const uint32_t* bytes, size_t count, bool spaces, bool marked,
              std::vector<Symbol>& symbols) const {
    symbols.clear();
    if (!wholes_.empty()) {
      const auto whole = wholes_.find(std::string(reinterpret_cast<const char*>(text) + bytes[0], bytes[count] - bytes[0]));
      if (whole != wholes_.end()) return symbols.push_back({whole->second, 0, kNoRank});
    }
    if (marked) symbols.push_back({mark_, 0, kNoRank});
    for (size_t i = 0; i < count; i++) {
      const auto known = spaces ? characters_.find(codes[i]) : characters_.end();
      if (known != characters_.end()) {
        symbols.push_back({known->second, int32_t(i), kNoRank});
      } else {
        for (uint32_t byte = bytes[i]; byte < bytes[i + 1]; byte++) symbols.push_back({bytes_[text[byte]], int32_t(i), kNoRank});
      }
    }
    merge(symbols);
  }

 private:
  static uint64_t pair(int32_t left, int32_t right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }

  const Merge* find(const Symbol& left, const Symbol& right) const {
    const auto found = merges_.find(pair(left.id, right.id));
    return found == merges_.end() ? nullptr : &found->second;
  }

  void rank(std::vector<Symbol>& symbols, size_t i) const {
    const Merge* merge = i + 1 < symbols.size() ? find(symbols[i], symbols[i + 1]) : nullptr;
    symbols[i].rank = merge ? merge->rank : kNoRank;
  }

  // The merge that was learned first, and of several of it the leftmost, until there is none.
  void merge(std::vector<Symbol>& symbols) const {
    for (size_t i = 0; i < symbols.size(); i++) rank(symbols, i);
    while (symbols.size() > 1) {
      size_t best = 0;
      for (size_t i = 1; i < symbols.size(); i++) best = symbols[i].rank < symbols[best].rank ? i : best;
      if (symbols[best].rank == kNoRank) return;
      symbols[best].id = find(symbols[best], symbols[best + 1])->result;
      symbols.erase(symbols.begin() + int64_t(best) + 1);
      rank(symbols, best);
      if (best) rank(symbols, best - 1);
    }
  }

  std::vector<int32_t> bytes_;
  int32_t mark_;
  std::unordered_map<uint32_t, int32_t> characters_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::unordered_map<std::string, int32_t> wholes_;
};

}  // namespace
}  // namespace graft

struct GraftWords {
  explicit GraftWords(const GraftVocabulary& of)
      : vocabulary(of),
        kinds(of.kinds, of.kinds + graft::kNumCharacters),
        controls(of.controls, of.controls + of.num_controls),
        widths(of.widths, of.widths + of.num_controls),
        first_control(uint32_t(of.first_control)),
        pattern(of.pattern),
        marks(of.marks),
        digits_alone(of.digits_alone != 0) {}

  const graft::Vocabulary vocabulary;
  const std::vector<uint8_t> kinds;
  const std::vector<int32_t> controls, widths;
  const uint32_t first_control;
  const int32_t pattern, marks;
  const bool digits_alone;

  std::mutex mutex;  // of what follows
  graft::Generation young, old;
  graft::Characters characters;
  std::vector<graft::Symbol> symbols;
  std::vector<int32_t> numbers;

  // Ids of the word of `count` characters from `i` on, then where in it each begins.
  const int32_t* find(const uint8_t* text, size_t i, size_t count, bool marked, uint32_t* num_ids) {
    const uint32_t* bytes = characters.bytes.data() + i;
    const uint8_t* key = text + bytes[0];
    const size_t size = bytes[count] - bytes[0];
    const bool remember = size <= graft::kRemembered;
    const uint64_t hash = remember ? graft::hash_of(key, size, marked) : 0;
    const graft::Word* word = remember ? young.find(key, size, marked, hash) : nullptr;
    if (!word) {
      word = remember ? old.find(key, size, marked, hash) : nullptr;
      if (word) {
        numbers.assign(old.numbers(*word), old.numbers(*word) + 2 * word->count);
      } else {
        vocabulary.encode(text, characters.codes.data() + i, bytes, count, pattern == graft::kSpaces, marked, symbols);
        numbers.clear();
        for (const graft::Symbol& symbol : symbols) numbers.push_back(symbol.id);
        for (const graft::Symbol& symbol : symbols) numbers.push_back(symbol.start);
      }
      *num_ids = uint32_t(numbers.size() / 2);
      if (!remember) return numbers.data();
      if (young.size() >= graft::kGeneration) {
        graft::Generation fresh;  // before anything is moved: it may find no memory
        old = std::move(young);
        young = std::move(fresh);
      }
      word = young.add(key, size, marked, hash, numbers.data(), *num_ids);
    }
    *num_ids = word->count;
    return young.numbers(*word);
  }

  // Where the section ends that begins at `i`: at a control token, and where digits are split from all else
  // also at a digit, which is a section of its own.
  size_t section_end(size_t i) const {
    const std::vector<uint8_t>& of = characters.kinds;
    if (digits_alone && of[i] == graft::kNumber) return i + 1;
    while (i < of.size() && of[i] != graft::kControl && !(digits_alone && of[i] == graft::kNumber)) i++;
    return i;
  }
};

namespace graft {
namespace {

// Reads the texts of one call, one after the other.
class Reading {
 public:
  Reading(GraftWords& words, const GraftTexts& call) : words_(words), call_(call) {}

  void run() {
    int64_t begin = 0;
    for (int64_t text = 0; text < call_.count; begin = call_.ends[text++]) {
      const int64_t before = written_;
      call_.done[text] = read(call_.text + begin, size_t(call_.ends[text] - begin));
      if (!call_.done[text]) written_ = before;
      call_.id_ends[text] = written_;
    }
  }

 private:
  bool read(const uint8_t* text, size_t size) {
    Characters& of = words_.characters;
    if (!of.decode(text, size, words_.kinds.data())) return false;
    longer_ = 0;
    for (size_t i = 0, section; i < of.kinds.size(); i = section) {
      if (of.kinds[i] == kControl) {
        const uint32_t control = of.codes[i] - words_.first_control;
        const int32_t id = words_.controls[control], start = 0;
        if (!write(&id, &start, 1, i)) return false;
        longer_ += words_.widths[control] - 1;
        section = i + 1;
      } else {
        section = words_.section_end(i);
        if (!read_section(text, i, section)) return false;
      }
    }
    return true;
  }

  bool read_section(const uint8_t* text, size_t i, size_t end) {
    const Characters& of = words_.characters;
    const Splitter splitter{of.codes.data(), of.kinds.data()};
    const int32_t marks = words_.marks;
    bool marked = marks == kAll || (marks != kNone && of.codes[i] != ' ' && (marks == kNotSpaces || i == 0));
    for (size_t next; i < end; i = next, marked = false) {
      next = splitter.next(i, end, words_.pattern);
      if (of.bytes[next] - of.bytes[i] > kLongest) return false;
      uint32_t count;
      const int32_t* numbers = words_.find(text, i, next - i, marked, &count);
      if (!write(numbers, numbers + count, count, i)) return false;
    }
    return true;
  }

  bool write(const int32_t* ids, const int32_t* starts, uint32_t count, size_t origin) {
    if (written_ + count > call_.capacity) return false;
    memcpy(call_.ids + written_, ids, count * sizeof(int32_t));
    for (uint32_t k = 0; k < count; k++) call_.starts[written_ + k] = starts[k] + int32_t(origin) + longer_;
    written_ += count;
    return true;
  }

  GraftWords& words_;
  const GraftTexts& call_;
  int64_t written_ = 0;
  int32_t longer_ = 0;  // characters that the control tokens so far stand for, beyond one each
};

}  // namespace
}  // namespace graft

// Null where memory is out.
GRAFT_API GraftWords* graft_words_new(const GraftVocabulary* vocabulary) {
  try {
    return new GraftWords(*vocabulary);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

GRAFT_API void graft_words_free(GraftWords* words) { delete words; }

// Returns 0 where memory is out. Calls wait for each other.
GRAFT_API int32_t graft_words_read(GraftWords* words, const GraftTexts* texts) {
  std::lock_guard<std::mutex> lock(words->mutex);
  try {
    graft::Reading(*words, *texts).run();
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
