# A newer gRPC below CMAKE_PREFIX_PATH is taken, with its protobuf, and not the distribution's. The prefix is a fake: package files
# with higher versions that lead to the real libraries. Configures only.
# Run as: cmake -DSOURCE=. -DBINARY=folder -DGRPC_DIR=the distribution's -DCXX=compiler -P newer_grpc_test.cmake
set(prefix ${BINARY}/prefix)
file(REMOVE_RECURSE ${BINARY})
file(WRITE ${prefix}/lib/cmake/grpc/gRPCConfig.cmake "include(${GRPC_DIR}/gRPCConfig.cmake)\nset(gRPC_VERSION 1.99.0)\n")
file(WRITE ${prefix}/lib/cmake/protobuf/protobuf-config.cmake
  "include(FindProtobuf)\nset(Protobuf_VERSION 99.0)\nset(Protobuf_FOUND TRUE)\n")
execute_process(COMMAND ${CMAKE_COMMAND} -S ${SOURCE} -B ${BINARY}/build -G Ninja -DCMAKE_CXX_COMPILER=${CXX} -DMINITRON_TESTS=OFF
  -DMINITRON_CUDA=OFF -DCMAKE_PREFIX_PATH=${prefix} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE code)
if(NOT code EQUAL 0)
  message(FATAL_ERROR "cannot be configured:\n${output}")
endif()
string(FIND "${output}" "gRPC 1.99.0 of ${prefix}/lib/cmake/grpc, protobuf 99.0" at)
if(at EQUAL -1)
  message(FATAL_ERROR "took another gRPC:\n${output}")
endif()
