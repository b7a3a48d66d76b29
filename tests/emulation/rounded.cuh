static inline float add_rounded(float a, float b) { volatile float r = a + b; return r; }
static inline float subtract_rounded(float a, float b) { volatile float r = a - b; return r; }
static inline float multiply_rounded(float a, float b) { volatile float r = a * b; return r; }
static inline float divide_rounded(float a, float b) { volatile float r = a / b; return r; }
