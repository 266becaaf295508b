#include "errors.h"

#include <stdexcept>
#include <string>

namespace imf {

void refuse(const char* text, std::initializer_list<index_t> numbers) {
  std::string message;
  for (auto number = numbers.begin(); *text; ++text) {
    message += *text == '%' ? std::to_string(*number++) : std::string(1, *text);
  }
  throw std::invalid_argument(message);
}

}  // namespace imf
